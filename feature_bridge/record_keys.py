"""What the keys of a record, a turn and a content part mean: read, known to change nothing, or a reason to skip it.

An unknown key of a turn or part skips the record by name, for it may say what is to be learnt. At the top of a record
people keep much else: an unknown key there skips it only where its value looks like media, masks, weights or messages;
otherwise it is counted as ignored. A value that is empty (null, "", [], {}) says nothing, whatever its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from feature_bridge.media import SampleError

UNREAD = "field that is not read"  # what these records are counted by

# Whether an answer is learnt: 0 or 1, in a turn, or beside the conversation in a list with one for each turn or answer.
LOSS_KEYS = ("weight", "loss", "loss_mask", "train", "training", "step_loss_mask")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_details")
COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}  # of media beside the conversation

_RECORD = {"messages", "conversations", "system", "tools", "functions", "id", *COLUMNS["image"], *COLUMNS["video"]}
_TURN = {"role", "from", "content", "value", "tool_calls", "function_call", *LOSS_KEYS, *THOUGHT_KEYS}
_PARTS = {
    "text": {"type", "text"},
    "image": {"type", "image", "image_url", "url", "path"},
    "video": {"type", "video", "video_url", "url", "path", "fps", "sample_fps", "raw_fps"},
}
_REFERENCE = {"url", "path", "bytes"}

# Where something comes from, what it is about, how good somebody found it: never what is learnt.
_HARMLESS = {
    *("id", "ids", "uuid", "uid", "idx", "index", "hash", "name", "type", "kind", "key", "md5", "sha256", "__key__"),
    *("source", "sources", "origin", "dataset", "dataset_name", "subset", "split", "url", "urls", "doi", "license"),
    *("category", "categories", "topic", "topics", "task", "task_type", "domain", "domains", "tag", "tags", "keywords"),
    *("subject", "subjects", "difficulty", "level", "language", "languages", "lang", "locale", "country", "label"),
    *("score", "scores", "rating", "ratings", "quality", "reward", "rewards", "rank", "votes", "likes", "feedback"),
    *("model", "models", "model_name", "generator", "author", "user", "user_id", "annotator", "annotators"),
    *("date", "time", "timestamp", "created", "created_at", "created_date", "updated_at", "create_time", "version"),
    *("usage", "finish_reason", "stop_reason", "num_tokens", "token_count", "tokens_count", "length", "turn", "cost"),
    *("metadata", "meta", "info", "extra_info", "stats", "statistics", "debug", "comment", "comments", "notes"),
    *("toxic", "toxicity", "toxicity_labels", "detoxify", "moderation", "openai_moderation", "redacted", "pii"),
    *("conversation_id", "conversation_hash", "message_id", "message_tree_id", "parent_id", "prompt_id", "image_id"),
    *("video_id", "image_size", "image_sizes", "image_width", "image_height", "width", "height", "resolution"),
    *("chosen", "rejected"),  # of preference data, whose `messages` are the ones to learn
}  # fmt: skip
_HARMLESS_IN_TURN = _HARMLESS - {"chosen", "rejected", "type", "label", "image_id", "video_id"} | {
    *("hashed_ip", "header", "state", "turn", "turn_id", "turn_identifier", "role_name", "deleted", "synthetic"),
    *("review_count", "review_result", "tree_state", "emojis", "logprobs", "end_turn", "markdown"),
}  # fmt: skip
_OF_THE_PROMPT = {"enable_thinking", "chat_template", "chat_template_kwargs", "documents"}  # thinking is off
_HARMLESS_IN_PART = {"id", "uuid", "index", "cache_control", "detail", "name", "mime_type", "media_type", "format"}
_HARMLESS_IN_REFERENCE = _HARMLESS_IN_PART | {"width", "height", "size", "filename", "file_name"}

_REMEDIES = {  # by kind of part
    "text": "take it out",
    "image": "set data.{min,max}_pixels, or take it out",
    "video": "set data.video_{fps,max_frames}",
}
_MEDIA_NAME = re.compile(
    r"(data:(image|video)/"
    r"|/9j/|iVBORw0KGgo|R0lGOD|UklGR"  # JPEG, PNG, GIF and WebP in base64
    r"|[^\n]{1,4000}\.(png|jpe?g|gif|webp|bmp|tiff?|avif|heic|mp4|mov|mkv|avi|webm)(\?[^\n]*)?$)",
    re.IGNORECASE,
)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\x1aE\xdf\xa3")  # also AVI, WebM
_DEEPEST = 6  # levels at which media or messages are looked for


# --- keys -------------------------------------------------------------------------------------------------------------


def unread(reason: str) -> SampleError:
    return SampleError(UNREAD, reason)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict | bytes) and not value)


def ignored(record: Mapping[str, Any], media: Iterable[Any]) -> tuple[str, ...]:
    """The unknown keys at the top of a record whose values change nothing.

    Args:
        media: the paths that are read from the record's columns and turns. Naming one of them again loses nothing.

    Raises:
        SampleError: an unknown key whose value looks like media, masks, weights or messages.
    """
    read, names = [value for value in media if isinstance(value, str)], []
    for key, value in record.items():
        if key in _RECORD or key in LOSS_KEYS or key in _HARMLESS or is_empty(value):
            continue
        if key in _OF_THE_PROMPT:
            if value not in (False, {"enable_thinking": False}):
                raise unread(f"the record has {key}, which changes the prompt and is not read; take it out")
            continue
        values = value if isinstance(value, list) else [value]
        if (what := looks_like(value)) and not all(each in read for each in values):
            raise unread(f"the record has {_short(key)}, which looks like {what} and is not read; {_remedy(what)}")
        names.append(_short(key))
    return tuple(names)


def check_turn(turn: Mapping[str, Any], index: int) -> None:
    """Raises SampleError: the turn has a key that is neither read nor known to change nothing."""
    for key, value in turn.items():
        if key not in _TURN and key not in _HARMLESS_IN_TURN and not is_empty(value):
            raise unread(f"turn {index} has {_short(key)}, which is not read; take it out")


def check_part(part: Mapping[str, Any], kind: str, index: int) -> None:
    """The same of a part of a turn, a "text", "image" or "video"."""
    name = {"text": "text", "image": "picture", "video": "video"}[kind]
    for key, value in part.items():
        if key not in _PARTS[kind] and key not in _HARMLESS_IN_PART and not is_empty(value):
            raise unread(f"turn {index} has a {name} with {_short(key)}, which is not read; {_REMEDIES[kind]}")
        if key in _PARTS[kind]:
            check_reference(value, kind, f"turn {index} has a {name} with ")


def check_reference(value: Any, kind: str, where: str) -> None:
    """The same of a picture or video that is given as an object. Raises SampleError."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _REFERENCE and key not in _HARMLESS_IN_REFERENCE and not is_empty(inner):
                raise unread(f"{where}{_short(key)}, which is not read; {_REMEDIES[kind]}")
        if {type(value.get("url")), type(value.get("path"))} == {str} and value["url"] != value["path"]:
            raise unread(f"{where}url and path, which differ; give one of them")


def looks_like(value: Any, depth: int = 0) -> str:
    """What a value may be that changes the prompt or what is learnt of it, in a word or two; empty: nothing."""
    if isinstance(value, bytes):
        return "media" if value.startswith(_MAGIC) or value[4:8] == b"ftyp" else ""
    if isinstance(value, str):
        return "media" if _MEDIA_NAME.match(value) else ""
    if depth > _DEEPEST:
        return ""
    if isinstance(value, list | tuple):
        if value and all(isinstance(each, int | float) for each in value):
            return "masks or weights"
        return next((what for each in value if (what := looks_like(each, depth + 1))), "")
    if isinstance(value, Mapping):
        if not is_empty(value.get("role", value.get("from"))) and {"content", "value"} & set(value):
            return "messages"
        if isinstance(value.get("bytes"), bytes):  # the stored form of a `datasets` Image
            return "media"
        if isinstance(value.get("function"), Mapping) or {"name", "parameters"} <= set(value):
            return "tools"
        return next((what for each in value.values() if (what := looks_like(each, depth + 1))), "")
    return ""


def _remedy(what: str) -> str:
    return "name the column images or videos" if what == "media" else "take it out"


def _short(key: Any) -> str:
    text = str(key)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- values -----------------------------------------------------------------------------------------------------------


def learnt(turn: Mapping[str, Any], index: int, role: str) -> bool | None:
    """Whether the turn says that it is to be learnt; None: it does not say.

    Raises:
        SampleError: it says so in another way than by 0 and 1, or both, or it is no assistant's and is to be learnt.
    """
    said: dict[str, bool] = {}
    for key in LOSS_KEYS:
        if (value := turn.get(key)) is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise unread(f"turn {index} has {key}={_short(repr(value))}, which is not read; give 0 or 1")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise unread(f"turn {index} has {' and '.join(said)}, which contradict each other; give one of them")
    if role != "assistant" and any(said.values()):
        raise unread(f"turn {index} has {next(iter(said))} in a {role} turn, and only answers are learnt; take it out")
    return next(iter(said.values()), None)


def learnt_beside(record: Mapping[str, Any], roles: Sequence[str]) -> list[bool | None]:
    """What stands beside the conversation of the turns that are to be learnt: for each turn, or None.

    Raises:
        SampleError: a list of another length, or a value that is neither 0 nor 1.
    """
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    found: list[bool | None] = [None] * len(roles)
    for key in LOSS_KEYS:
        value = record.get(key)
        if is_empty(value) or (isinstance(value, int | float) and value == 1):
            continue
        if not isinstance(value, list):
            raise unread(f"the record has {key}={_short(repr(value))}, which is not read; give 0 or 1 in its turns")
        if len(value) not in (len(roles), len(answers)):
            raise unread(
                f"the record has {key} of {len(value)} values for {len(roles)} turns and {len(answers)} answers; "
                "give one for each"
            )
        places = range(len(roles)) if len(value) == len(roles) else answers
        for index, each in zip(places, value, strict=True):
            said = learnt({key: each}, index, roles[index])
            if said is not None and found[index] not in (None, said):
                raise unread(f"turn {index} has {key} and another of {', '.join(LOSS_KEYS)} beside the conversation")
            found[index] = found[index] if said is None else said
    return found


def thought(turn: Mapping[str, Any], index: int, role: str) -> str:
    """What the turn's author thought; empty: nothing. Raises SampleError: no text, two texts, or not an answer's."""
    said: dict[str, str] = {}
    for key in THOUGHT_KEYS:
        value = turn.get(key)
        if is_empty(value) or value is False:
            continue
        text = _details(value) if key == "reasoning_details" else value
        if not isinstance(text, str):
            raise unread(f"turn {index} has {key} of type {type(value).__name__}, which is not read; give a text")
        said[key] = text
    if len({"".join(text.split()) for text in said.values()}) > 1:
        raise unread(f"turn {index} has {' and '.join(said)}, which differ; give one of them")
    if said and role != "assistant":
        raise unread(f"turn {index} has {next(iter(said))} in a {role} turn, where no template has a place for it")
    return next(iter(said.values()), "")


def _details(value: Any) -> str | None:
    """OpenRouter's list of a thought's pieces, as one text; None: it is something else, or encrypted."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        return None
    pieces = [each.get("text") or each.get("summary") for each in value]
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else None

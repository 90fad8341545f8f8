"""Records of a data file -> conversations in one form.

Two forms are read: OpenAI's `messages` (content a string, or parts `text`, `image_url`, `image`, `video_url`, `video`)
and ShareGPT's `conversations` (`from`/`value`), either with pictures beside it in `images` (or `image`) and videos in
`videos` (or `video`). What is given beside the conversation stands where the text has `<image>` and `<video>` markers,
else at the start of the first user turn (as SpecForge does). What other keys mean is in `record_keys`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge import media, record_keys, video
from feature_bridge.media import Media, SampleError
from feature_bridge.media_places import NAMES, Piece, Slot, Visual, beside, place
from feature_bridge.video import Video

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; it ends with an assistant turn.

    `content` is a string, or, in a turn with pictures or videos, a list of `{"type": "image"}`, `{"type": "video"}` and
    `{"type": "text", "text": …}`. An answer that is not to be learnt has `"weight": 0`, as in OpenAI's format; a
    thought is its `reasoning_content`.
    """

    sample_id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Media, ...]  # in the order of their places
    videos: tuple[Video, ...] = ()
    ignored: tuple[str, ...] = ()  # keys of the record that are unknown, and whose values change nothing


def parse(record: Any, where: str, folder: Path) -> Conversation:
    """Reads one record.

    Args:
        where: names the record; it is the sample's id if the record has none.
        folder: what relative picture paths are relative to.

    Raises:
        SampleError: the record is not a conversation, its pictures and their places do not match, or it has a key that
            is not read and may change what is learnt.
    """
    if not isinstance(record, dict):
        raise _broken(f"expected a JSON object, got {type(record).__name__}")
    openai = bool(record.get("messages"))
    turns = record["messages"] if openai else record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _broken("neither 'messages' nor 'conversations' holds a list of turns")
    for key in ("tools", "functions"):  # they would belong into the prompt
        if record.get(key) not in (None, "", "[]", [], {}):
            raise _broken(f"the record has {key}, which are not read; leave out conversations with tools")
    if openai and record.get("conversations"):
        _check_same(turns, record["conversations"])
    read = [_read_turn(turn, index) for index, turn in enumerate(turns)]
    beside_turns = record_keys.learnt_beside(record, [role for role, *_ in read])
    for index, ((*_, inside), said) in enumerate(zip(read, beside_turns, strict=True)):
        if {inside, said} >= {True, False}:
            raise record_keys.unread(f"turn {index} is to be learnt by itself or by the record, and not by the other")
    learnt = [False not in (inside, said) for (*_, inside), said in zip(read, beside_turns, strict=True)]
    if (system := record.get("system")) not in (None, ""):  # LLaMA-Factory's form; a system turn goes first
        if not isinstance(system, str):
            raise _broken(f"the record has system of type {type(system).__name__}, expected a string")
        if read[0][0] != "system":
            read, learnt = [("system", system, "", None), *read], [True, *learnt]
    given = beside(record, "image", folder) + beside(record, "video", folder)
    # Elsewhere "<image>" is a piece of text like any other.
    marked = tuple(kind for kind in NAMES if not openai or any(visual.kind == kind for visual in given))

    roles = [role for role, *_ in read]
    contents = [
        _pieces(content, index, role, marked if role == "user" else ())
        for index, (role, content, *_) in enumerate(read)
    ]
    named = [_reference(visual.value) for visual in (*given, *itertools.chain(*contents)) if isinstance(visual, Visual)]
    ignored = record_keys.ignored(record, named)
    if "assistant" not in roles:
        raise _broken("no assistant turn")
    place(given, roles, contents, folder)

    # Nothing after the last answer is supervised, and templates render an answer otherwise once a question follows it.
    end = len(roles) - roles[::-1].index("assistant")
    messages, images, videos = [], [], []
    for pieces, (role, _, reasoning, _), is_learnt in zip(contents[:end], read, learnt, strict=False):
        seen = [piece for piece in pieces if isinstance(piece, Visual)]
        images += [media.resolve(piece.value, folder) for piece in seen if piece.kind == "image"]
        videos += [video.resolve(piece.value, piece.fps, folder) for piece in seen if piece.kind == "video"]
        message = {"role": role, "content": _as_template_content(pieces)}
        unlearnt = role == "assistant" and not is_learnt
        messages.append(
            message | ({"reasoning_content": reasoning} if reasoning else {}) | ({"weight": 0} if unlearnt else {})
        )
    sample_id = record.get("id")
    sample_id = str(sample_id) if isinstance(sample_id, str | int) else where
    return Conversation(sample_id, tuple(messages), tuple(images), tuple(videos), ignored)


def num_unasked(messages: Sequence[Mapping[str, Any]]) -> int:
    """The number of assistant turns before any other turn. No prompt asks for them: they are context."""
    return len(list(itertools.takewhile(lambda message: message["role"] == "assistant", messages)))


def with_answer(record: Any) -> tuple[Any, bool]:
    """The record, a question at its end followed by an empty answer, for somebody to write; and whether one was."""
    key = "messages" if isinstance(record, dict) and record.get("messages") else "conversations"
    turns = record.get(key) if isinstance(record, dict) else None
    last = turns[-1] if isinstance(turns, list) and turns else None
    name = (last.get("role") if last.get("role") is not None else last.get("from")) if isinstance(last, dict) else None
    if not isinstance(name, str) or _ROLES.get(name) != "user":
        return record, False
    lists = {name: [*record[name], 1] for name in record_keys.LOSS_KEYS if isinstance(record.get(name), list)}
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list) and record[name]:  # both of them, where they are the same
            lists[name] = [*record[name], {"role": "assistant", "content": ""}]
    return record | lists, True


def _read_turn(turn: Any, index: int) -> tuple[str, Any, str, bool | None]:
    """Role, content, thought, and whether the turn says that it is to be learnt."""
    if not isinstance(turn, dict):
        raise _broken(f"turn {index} is {type(turn).__name__}, expected an object")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _broken(f"turn {index} has the unknown role {name!r}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise _broken(f"turn {index} calls tools, which are not read")
    record_keys.check_turn(turn, index)
    given = [turn[key] for key in ("content", "value") if turn.get(key) is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise record_keys.unread(f"turn {index} has content and value, which differ; give one of them")
    content = given[0] if given else None
    return role, content, record_keys.thought(turn, index, role), record_keys.learnt(turn, index, role)


def _check_same(turns: list[Any], others: Any) -> None:
    """Raises SampleError: `messages` and `conversations` are two conversations."""
    both = [
        [_read_turn(turn, i)[:2] for i, turn in enumerate(each)] for each in (turns, others) if isinstance(each, list)
    ]
    if len(both) < 2 or both[0] != both[1]:
        raise record_keys.unread("the record has messages and conversations, which differ; give one of them")


def _pieces(content: Any, index: int, role: str, marked: tuple[str, ...]) -> list[Piece]:
    """A turn's content as texts, pictures, videos, and places for those of the `marked` kinds."""
    if isinstance(content, str):
        return _split_markers(content, marked)
    if not isinstance(content, list):
        raise _broken(
            f"turn {index} has content of type {type(content).__name__}, expected a string or a list of parts"
        )
    pieces: list[Piece] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            record_keys.check_part(part, kind, index)
            pieces += _split_markers(part["text"], marked)
        elif kind in ("image", "image_url", "video", "video_url"):
            pieces.append(_visual(part, kind.removesuffix("_url"), index, role))
        else:
            raise _broken(f"turn {index} has a content part that is neither text, picture nor video (type {kind!r})")
    return pieces


def _visual(part: dict[str, Any], kind: str, index: int, role: str) -> Visual | Slot:
    if role != "user":
        raise _broken(f"turn {index} has a {NAMES[kind]} in a {role} turn")
    record_keys.check_part(part, kind, index)
    given = [part[key] for key in (f"{kind}_url", kind, "url", "path") if part.get(key) is not None]
    if any(_reference(each) != _reference(given[0]) for each in given):
        raise record_keys.unread(f"turn {index} has a {NAMES[kind]} that is given twice and differs; give it once")
    if part.get("fps") is not None and part.get("sample_fps") not in (None, part["fps"]):
        raise record_keys.unread(f"turn {index} has a video with fps and sample_fps, which differ; give one of them")
    fps = part["fps"] if part.get("fps") is not None else part.get("sample_fps")
    return Visual(kind, given[0], fps) if given else Slot(kind)


def _reference(value: Any) -> Any:
    """A path, also where it is given as an object."""
    return value.get("url") or value.get("path") or value if isinstance(value, dict) else value


def _split_markers(text: str, kinds: tuple[str, ...]) -> list[Piece]:
    """The text, with a slot in place of every "<image>" or "<video>" of these kinds."""
    if not kinds:
        return [text]
    pieces = re.split(f"<({'|'.join(kinds)})>", text)
    return [Slot(piece) if position % 2 else piece for position, piece in enumerate(pieces)]


def _as_template_content(pieces: list[Piece]) -> str | list[dict[str, str]]:
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    nonempty = [piece for piece in pieces if piece != ""]
    return [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": piece.kind} for piece in nonempty]


def _broken(reason: str) -> SampleError:
    return SampleError("broken line", reason)

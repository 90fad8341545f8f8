"""Records of a data file -> conversations in one form.

Two forms are read: OpenAI's `messages` (content a string, or parts `text`, `image_url`, `image`, `video_url`, `video`)
and ShareGPT's `conversations` (`from`/`value`), either with pictures beside it in `images` (or `image`) and videos in
`videos` (or `video`). What is given beside the conversation stands where the text has `<image>` and `<video>` markers,
else at the start of the first user turn (as SpecForge does).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge import media, video
from feature_bridge.media import Media, SampleError
from feature_bridge.video import Video

# How Qwen's own tools sample a single video. They are not supported: a video that has one is refused, not misread.
_UNREAD = (
    "nframes",
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "video_start",
    "video_end",
)

_NAMES = {"image": "picture", "video": "video"}
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
    `{"type": "text", "text": …}`. An answer that is not to be learnt has `"weight": 0`, as in OpenAI's format.
    """

    sample_id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Media, ...]  # in the order of their places
    videos: tuple[Video, ...] = ()


@dataclass(frozen=True)
class _Slot:
    """The place of a picture or video that is given beside the conversation."""

    kind: str  # "image" or "video"


def parse(record: Any, where: str, folder: Path) -> Conversation:
    """Reads one record.

    Args:
        where: names the record; it is the sample's id if the record has none.
        folder: what relative picture paths are relative to.

    Raises:
        SampleError: the record is not a conversation, or its pictures and their places do not match.
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
    if (system := record.get("system")) not in (None, ""):  # LLaMA-Factory's form; a system turn goes first
        if not isinstance(system, str):
            raise _broken(f"the record has system of type {type(system).__name__}, expected a string")
        if _read_turn(turns[0], 0)[0] != "system":
            turns = [{"role": "system", "content": system}, *turns]
    beside = _beside(record, "image") + _beside(record, "video")
    # Elsewhere "<image>" is a piece of text like any other.
    marked = tuple(kind for kind in _NAMES if not openai or any(visual.kind == kind for visual in beside))

    roles, contents, reasonings = [], [], []
    for index, turn in enumerate(turns):
        role, content, reasoning = _read_turn(turn, index)
        roles.append(role)
        contents.append(_pieces(content, index, role, marked if role == "user" else ()))
        reasonings.append(reasoning)
    if "assistant" not in roles:
        raise _broken("no assistant turn")
    _place(beside, roles, contents)

    # Nothing after the last answer is supervised, and templates render an answer otherwise once a question follows it.
    end = len(roles) - roles[::-1].index("assistant")
    messages, images, videos = [], [], []
    for role, pieces, reasoning, turn in zip(roles[:end], contents, reasonings, turns, strict=False):
        seen = [piece for piece in pieces if isinstance(piece, _Visual)]
        images += [media.resolve(piece.value, folder) for piece in seen if piece.kind == "image"]
        videos += [video.resolve(piece.value, piece.fps, folder) for piece in seen if piece.kind == "video"]
        message = {"role": role, "content": _as_template_content(pieces)}
        unlearnt = role == "assistant" and turn.get("weight") == 0
        messages.append(
            message | ({"reasoning_content": reasoning} if reasoning else {}) | ({"weight": 0} if unlearnt else {})
        )
    sample_id = record.get("id")
    named = isinstance(sample_id, str | int)
    return Conversation(str(sample_id) if named else where, tuple(messages), tuple(images), tuple(videos))


@dataclass(frozen=True)
class _Visual:
    kind: str  # "image" or "video"
    value: Any
    fps: Any = None  # of a video


_Piece = str | _Visual | _Slot


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
    return record | {key: [*turns, {"role": "assistant", "content": ""}]}, True


def _read_turn(turn: Any, index: int) -> tuple[str, Any, str]:
    if not isinstance(turn, dict):
        raise _broken(f"turn {index} is {type(turn).__name__}, expected an object")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _broken(f"turn {index} has the unknown role {name!r}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise _broken(f"turn {index} calls tools, which are not read")
    if role == "assistant" and turn.get("weight") not in (None, 0, 1):
        raise _broken(f"turn {index} has weight={turn['weight']!r}, which is not read; give 0 or 1")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    reasoning = turn.get("reasoning_content") or turn.get("reasoning") or ""
    if not isinstance(reasoning, str):
        raise _broken(f"turn {index} has reasoning_content of type {type(reasoning).__name__}")
    return role, content, reasoning


def _pieces(content: Any, index: int, role: str, marked: tuple[str, ...]) -> list[_Piece]:
    """A turn's content as texts, pictures, videos, and places for those of the `marked` kinds."""
    if isinstance(content, str):
        return _split_markers(content, marked)
    if not isinstance(content, list):
        raise _broken(
            f"turn {index} has content of type {type(content).__name__}, expected a string or a list of parts"
        )
    pieces: list[_Piece] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces += _split_markers(part["text"], marked)
        elif kind in ("image", "image_url", "video", "video_url"):
            pieces.append(_visual(part, kind.removesuffix("_url"), index, role))
        else:
            raise _broken(f"turn {index} has a content part that is neither text, picture nor video (type {kind!r})")
    return pieces


def _visual(part: dict[str, Any], kind: str, index: int, role: str) -> _Visual | _Slot:
    if role != "user":
        raise _broken(f"turn {index} has a {_NAMES[kind]} in a {role} turn")
    unread = [key for key in _UNREAD if part.get(key) is not None] if kind == "video" else []
    if unread:
        raise _broken(
            f"turn {index} has a video with {unread[0]}, which is not read; set data.video_{{fps,max_frames}}"
        )
    given = [part[key] for key in (f"{kind}_url", kind, "url", "path") if part.get(key) is not None]
    fps = part["fps"] if part.get("fps") is not None else part.get("sample_fps")
    return _Visual(kind, given[0], fps) if given else _Slot(kind)


def _split_markers(text: str, kinds: tuple[str, ...]) -> list[_Piece]:
    """The text, with a slot in place of every "<image>" or "<video>" of these kinds."""
    if not kinds:
        return [text]
    pieces = re.split(f"<({'|'.join(kinds)})>", text)
    return [_Slot(piece) if position % 2 else piece for position, piece in enumerate(pieces)]


def _beside(record: dict[str, Any], kind: str) -> list[_Visual]:
    value = record.get(f"{kind}s") if record.get(f"{kind}s") is not None else record.get(kind)
    values = value if isinstance(value, list) else [value]
    return [_Visual(kind, value) for value in values if value is not None and value != ""]  # "": LLaVA's rows of text


def _place(beside: list[_Visual], roles: list[str], contents: list[list[_Piece]]) -> None:
    """Puts the pictures and videos given beside the conversation into their places in `contents`."""
    unplaced = []
    for kind, name in _NAMES.items():
        given = [visual for visual in beside if visual.kind == kind]
        slots = sum(piece == _Slot(kind) for pieces in contents for piece in pieces)
        if slots and slots != len(given):
            raise placeholder_count(kind, slots, len(given))
        waiting = iter(given)
        for pieces in contents:
            pieces[:] = [next(waiting) if piece == _Slot(kind) else piece for piece in pieces]
        unplaced += [] if slots else given
        if unplaced and "user" not in roles:
            raise _broken(f"{name}s, but no user turn to put them in")
    if unplaced:
        contents[roles.index("user")][:0] = unplaced


def placeholder_count(kind: str, places: int, given: int) -> SampleError:
    """The error for a text with more or fewer places for "image"s or "video"s than were given."""
    return SampleError(
        f"{kind} placeholder count", f"{kind} placeholder count: {places}, {_NAMES[kind]}s given: {given}"
    )


def _as_template_content(pieces: list[_Piece]) -> str | list[dict[str, str]]:
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    nonempty = [piece for piece in pieces if piece != ""]
    return [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": piece.kind} for piece in nonempty]


def _broken(reason: str) -> SampleError:
    return SampleError("broken line", reason)

"""Records of a data file -> conversations in one form.

Two forms are read: OpenAI's `messages` (content a string, or parts `text`, `image_url`, `image`) and ShareGPT's
`conversations` (`from`/`value`), either with pictures beside it in `images` (or `image`). Pictures given beside the
conversation stand where the text has `<image>` markers, else at the start of the first user turn (as SpecForge does).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge import media
from feature_bridge.media import Media, SampleError

IMAGE_MARKER = "<image>"

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

    `content` is a string, or, in a turn with pictures, a list of `{"type": "image"}` and `{"type": "text", "text": …}`.
    """

    sample_id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Media, ...]  # in the order of their places


class _Slot:
    """The place of a picture that is given beside the conversation."""


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
    openai = record.get("messages") is not None
    turns = record["messages"] if openai else record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _broken("neither 'messages' nor 'conversations' holds a list of turns")
    beside = _pictures_beside(record)
    marked = bool(beside) or not openai  # elsewhere "<image>" is a piece of text like any other

    roles, contents, reasonings = [], [], []
    for index, turn in enumerate(turns):
        role, content, reasoning = _read_turn(turn, index)
        roles.append(role)
        contents.append(_pieces(content, index, role, marked and role == "user"))
        reasonings.append(reasoning)
    if "assistant" not in roles:
        raise _broken("no assistant turn")
    _place(beside, roles, contents)

    # Nothing after the last answer is supervised, and templates render an answer otherwise once a question follows it.
    end = len(roles) - roles[::-1].index("assistant")
    messages, images = [], []
    for role, pieces, reasoning in zip(roles[:end], contents[:end], reasonings[:end], strict=True):
        images += [media.resolve(piece.value, folder) for piece in pieces if isinstance(piece, _Picture)]
        message = {"role": role, "content": _as_template_content(pieces)}
        messages.append(message | ({"reasoning_content": reasoning} if reasoning else {}))
    sample_id = record.get("id")
    named = isinstance(sample_id, str | int)
    return Conversation(str(sample_id) if named else where, tuple(messages), tuple(images))


@dataclass(frozen=True)
class _Picture:
    value: Any


_Piece = str | _Picture | _Slot


def _read_turn(turn: Any, index: int) -> tuple[str, Any, str]:
    if not isinstance(turn, dict):
        raise _broken(f"turn {index} is {type(turn).__name__}, expected an object")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _broken(f"turn {index} has the unknown role {name!r}")
    if turn.get("tool_calls"):
        raise _broken(f"turn {index} calls tools, which are not read")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    reasoning = turn.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise _broken(f"turn {index} has reasoning_content of type {type(reasoning).__name__}")
    return role, content, reasoning


def _pieces(content: Any, index: int, role: str, marked: bool) -> list[_Piece]:
    """A turn's content as texts, pictures, and places for pictures given beside the conversation."""
    if isinstance(content, str):
        return _split_markers(content) if marked else [content]
    if not isinstance(content, list):
        raise _broken(
            f"turn {index} has content of type {type(content).__name__}, expected a string or a list of parts"
        )
    pieces: list[_Piece] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces += _split_markers(part["text"]) if marked else [part["text"]]
        elif kind in ("image", "image_url") and role == "user":
            given = [part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None]
            pieces.append(_Picture(given[0]) if given else _Slot())
        elif kind in ("image", "image_url"):
            raise _broken(f"turn {index} has a picture in a {role} turn")
        elif kind in ("video", "video_url"):  # a video's frames would become pieces here
            raise _broken(f"turn {index} has a video, which is not read yet")
        else:
            raise _broken(f"turn {index} has a content part that is neither text nor a picture (type {kind!r})")
    return pieces


def _split_markers(text: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    for position, piece in enumerate(text.split(IMAGE_MARKER)):
        pieces += [_Slot(), piece] if position else [piece]
    return pieces


def _pictures_beside(record: dict[str, Any]) -> list[_Picture]:
    value = record.get("images") if record.get("images") is not None else record.get("image")
    values = value if isinstance(value, list) else [value]
    return [_Picture(value) for value in values if value is not None]


def _place(beside: list[_Picture], roles: list[str], contents: list[list[_Piece]]) -> None:
    """Puts the pictures given beside the conversation into their places, in `contents`."""
    slots = sum(isinstance(piece, _Slot) for pieces in contents for piece in pieces)
    if slots and slots != len(beside):
        raise SampleError("image placeholder count", f"image placeholder count: {slots}, pictures given: {len(beside)}")
    if slots:
        waiting = iter(beside)
        for pieces in contents:
            pieces[:] = [next(waiting) if isinstance(piece, _Slot) else piece for piece in pieces]
    elif beside:
        if "user" not in roles:
            raise _broken("pictures, but no user turn to put them in")
        first = contents[roles.index("user")]
        first[:0] = beside


def _as_template_content(pieces: list[_Piece]) -> str | list[dict[str, str]]:
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    nonempty = [piece for piece in pieces if piece != ""]
    return [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in nonempty]


def _broken(reason: str) -> SampleError:
    return SampleError("broken line", reason)

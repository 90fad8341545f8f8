"""Pictures and videos of a conversation, and their places: in a turn's parts, or in columns beside the conversation.

What is given in two places is the same and counts once, or the record is refused: it is never doubled, never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge import media, record_keys, video
from feature_bridge.media import SampleError

NAMES = {"image": "picture", "video": "video"}


@dataclass(frozen=True)
class Visual:
    kind: str  # "image" or "video"
    value: Any
    fps: Any = None  # of a video


@dataclass(frozen=True)
class Slot:
    """The place of a picture or video that is given beside the conversation."""

    kind: str  # "image" or "video"


Piece = str | Visual | Slot


def beside(record: Mapping[str, Any], kind: str, folder: Path) -> list[Visual]:
    """The pictures or videos in the record's columns. Raises SampleError: it has two columns, which differ."""
    columns: dict[str, list[Visual]] = {}
    for name in record_keys.COLUMNS[kind]:
        value = record.get(name)
        values = value if isinstance(value, list) else [value]
        for each in values:
            record_keys.check_reference(each, kind, f"the record has {name} with ")
        if given := [Visual(kind, each) for each in values if each is not None and each != ""]:  # "": LLaVA's text rows
            columns[name] = given
    if len(columns) < 2:
        return next(iter(columns.values()), [])
    fewer, more = sorted(columns.values(), key=len)
    if not is_part(_files(fewer, folder), _files(more, folder)):
        raise record_keys.unread(f"the record has {' and '.join(columns)}, which differ; give one of them")
    return more


def place(given: Sequence[Visual], roles: Sequence[str], contents: list[list[Piece]], folder: Path) -> None:
    """Puts the pictures and videos given beside the conversation into their places in `contents`.

    Raises:
        SampleError: more or fewer places than there are pictures or videos, or some in the turns and others beside.
    """
    unplaced: list[Visual] = []
    for kind, name in NAMES.items():
        waiting = _not_in_turns([visual for visual in given if visual.kind == kind], contents, kind, folder)
        slots = sum(piece == Slot(kind) for pieces in contents for piece in pieces)
        if slots and slots != len(waiting):
            raise placeholder_count(kind, slots, len(waiting))
        following = iter(waiting)
        for pieces in contents:
            pieces[:] = [next(following) if piece == Slot(kind) else piece for piece in pieces]
        unplaced += [] if slots else waiting
        if unplaced and "user" not in roles:
            raise SampleError("broken line", f"{name}s, but no user turn to put them in")
    if unplaced:
        contents[roles.index("user")][:0] = unplaced


def placeholder_count(kind: str, places: int, given: int) -> SampleError:
    """The error for a text with more or fewer places for "image"s or "video"s than were given."""
    return SampleError(
        f"{kind} placeholder count", f"{kind} placeholder count: {places}, {NAMES[kind]}s given: {given}"
    )


def is_part(fewer: Sequence[Any], more: Sequence[Any]) -> bool:
    """Whether `fewer` is `more` with some of them left out."""
    rest = iter(more)
    return all(each in rest for each in fewer)


def _not_in_turns(given: list[Visual], contents: list[list[Piece]], kind: str, folder: Path) -> list[Visual]:
    """Those of a column that the turns do not have themselves. Raises SampleError: nobody can tell."""
    pieces = [piece for pieces in contents for piece in pieces if getattr(piece, "kind", None) == kind]
    inline = [piece for piece in pieces if isinstance(piece, Visual)]
    if not given or not inline:
        return given
    column, in_turns = _files(given, folder), _files(inline, folder)
    if len(given) == len(pieces):  # the column has all of them, in order: those of the turns, and those for its slots
        both = list(zip(given, pieces, column, strict=True))
        if all(isinstance(piece, Slot) or _files([piece], folder) == [file] for _, piece, file in both):
            return [visual for visual, piece, _ in both if isinstance(piece, Slot)]
    elif len(given) == len(pieces) - len(inline) and not any(file in in_turns for file in column):
        return given
    raise record_keys.unread(
        f"{NAMES[kind]}s are given in the turns and in {' or '.join(record_keys.COLUMNS[kind])}, and they differ; "
        "give each of them once"
    )


def _files(visuals: Sequence[Visual], folder: Path) -> list[Any]:
    resolve: Mapping[str, Callable[[Any], Any]] = {
        "image": lambda value: media.resolve(value, folder),
        "video": lambda value: video.resolve(value, None, folder).source,
    }
    return [resolve[visual.kind](visual.value) for visual in visuals]

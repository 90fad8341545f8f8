"""The little world that the tiny target knows: things with facts, handwritten numbers, and the words for both.

Everything that the target is taught, and everything its answers are checked against, comes from `tiny_things.psv` and
from the file names in the folder of pictures (`fox.png`, `number_471_03.png`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

THINGS_FILE = Path(__file__).with_name("tiny_things.psv")

NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
SIZES = (
    "small enough for a pocket",
    "about as big as a hand",
    "small enough to carry under one arm",
    "about as big as a person",
    "larger than any person",
    "as large as a whole building",
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing with its picture. `size` runs from 1 (pocket) to 6 (building); `fact` completes "it ..."."""

    emoji: str
    name: str
    category: str
    color: str
    size: int
    place: str
    fact: str

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name.lower()) + ".png"

    @property
    def a(self) -> str:
        return with_article(self.name)

    @property
    def a_category(self) -> str:
        return with_article(self.category)

    @property
    def size_words(self) -> str:
        return SIZES[self.size - 1]


@dataclasses.dataclass(frozen=True)
class Number:
    """A picture of one or more handwritten digits, read from left to right."""

    file: str
    digits: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """All pictures that conversations can show."""

    things: tuple[Thing, ...]
    digits: tuple[Number, ...]  # one digit a picture
    numbers: tuple[Number, ...]  # two or three digits a picture


def load_things(path: Path = THINGS_FILE) -> tuple[Thing, ...]:
    """Things of the table, in its order."""
    rows = [line.split("|") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    things = tuple(Thing(e, n, c, color, int(size), place, fact) for e, n, c, color, size, place, fact in rows)
    for field in ("emoji", "name", "file"):
        assert len({getattr(t, field) for t in things}) == len(things), f"two things share one {field}"
    return things


def load_world(pictures: Path) -> World:
    """The things of the table and the numbers found in the folder `pictures`.

    Raises:
        ValueError: a thing has no picture there.
    """
    things = load_things()
    if missing := [t.file for t in things if not (pictures / t.file).exists()]:
        raise ValueError(f"pictures={str(pictures)!r} lacks {missing[0]!r}; make the pictures first")
    numbers = []
    for path in sorted(pictures.glob("number_*.png")):
        numbers.append(Number(path.name, tuple(int(c) for c in path.stem.split("_")[1])))
    one = tuple(n for n in numbers if len(n.digits) == 1)
    return World(things, one, tuple(n for n in numbers if len(n.digits) > 1))


def with_article(name: str) -> str:
    """ "fox" → "a fox", "owl" → "an owl"."""
    return ("an " if name[0].lower() in "aeiou" else "a ") + name


def plural(category: str) -> str:
    return category + ("es" if category.endswith("sh") else "s")


def count_words(n: int, noun: str) -> str:
    """(1, "fruit") → "one fruit", (3, "dish") → "three dishes"."""
    return f"{NUMBER_WORDS[n]} {noun if n == 1 else plural(noun)}"


def join_words(words: list[str]) -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]

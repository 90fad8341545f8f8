"""Conversations about the tiny world, with the one right answer to every turn.

An answer follows from the question's wording and the pictures alone, so that "exactly right" is well defined. The
stream is endless and random; a hash of what the user says keeps held-out conversations apart from those for training.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from random import Random

import tiny_dialogs as dialogs
from tiny_world import Number, Thing, World

Part = str | Thing | Number  # what a user's message is made of: text or a picture

HELD_OUT_SHARE = 16  # one conversation in 16 is held out
SYSTEMS = ("You are a careful observer.", "You are a helpful assistant.", "Answer kindly and completely.")
GREETINGS = ("", "", "", "", "Hello! ", "Please help me. ", "A quick question: ", "Thanks in advance. ")
KINDS: dict[str, Callable[[Random, World], list[tuple[list[Part], str]]]] = {
    "describe": dialogs.describe,
    "list": dialogs.list_pictures,
    "compare": dialogs.compare,
    "count": dialogs.count,
    "json": dialogs.as_json,
    "follow_up": dialogs.follow_up,
    "digits": dialogs.digits,
    "text": dialogs.text_only,
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of (user's parts, right answer), with an optional system message."""

    kind: str
    turns: tuple[tuple[tuple[Part, ...], str], ...]
    system: str | None = None

    def messages(self, answers: list[str] | None = None, folder: str = "pictures") -> list[dict]:
        """OpenAI-style messages; `answers` replaces the right answers (one a turn, or fewer to stop at a question)."""
        out: list[dict] = [{"role": "system", "content": self.system}] if self.system else []
        for i, (parts, right) in enumerate(self.turns):
            content = [
                {"type": "text", "text": p}
                if isinstance(p, str)
                else {"type": "image_url", "image_url": {"url": f"{folder}/{p.file}"}}
                for p in parts
            ]
            out.append({"role": "user", "content": content})
            if answers is not None and i >= len(answers):
                break
            out.append({"role": "assistant", "content": right if answers is None else answers[i]})
        return out

    def cut(self, num_turns: int) -> Conversation:
        return dataclasses.replace(self, turns=self.turns[:num_turns])

    @property
    def pictures(self) -> list[str]:
        return [p.file for parts, _ in self.turns for p in parts if not isinstance(p, str)]

    @property
    def key(self) -> str:
        """What the user says and shows, without greetings and system message: equal keys mean the same conversation."""
        says = [
            [p.removeprefix(_greeting(p)) if isinstance(p, str) else p.file for p in sorted_parts(parts)]
            for parts, _ in self.turns
        ]
        return json.dumps(says)

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


def sorted_parts(parts: tuple[Part, ...]) -> list[Part]:
    """Pictures before text: whether the question stands before or after the pictures makes no other conversation."""
    return [p for p in parts if not isinstance(p, str)] + [p for p in parts if isinstance(p, str)]


def _greeting(text: str) -> str:
    return next((g for g in GREETINGS if g and text.startswith(g)), "")


def conversation(rng: Random, world: World, kind: str) -> Conversation:
    """One random conversation of this kind."""
    turns = []
    for i, (parts, answer) in enumerate(KINDS[kind](rng, world)):
        pictures, text = list(parts[:-1]), parts[-1]
        if i == 0:
            text = rng.choice(GREETINGS) + text
        # The field's data has pictures before the question, seldom after it.
        turns.append(((text, *pictures) if rng.random() < 0.2 else (*pictures, text), answer.strip()))
    return Conversation(kind, tuple(turns), rng.choice(SYSTEMS) if rng.random() < 0.15 else None)


def stream(seed: int, world: World, held_out: bool, weights: dict[str, float] | None = None) -> Iterator[Conversation]:
    """Endless conversations from one side of the split; `weights` says how often each kind comes (default: evenly)."""
    rng = Random(seed)
    kinds = list(KINDS)
    chances = [1.0 if weights is None else weights[k] for k in kinds]
    while True:
        found = conversation(rng, world, rng.choices(kinds, chances)[0])
        if found.held_out == held_out:
            yield found


def distinct(seed: int, world: World, held_out: bool, count: int) -> list[Conversation]:
    """`count` different conversations, the kinds in turn."""
    found: dict[str, Conversation] = {}
    streams = [stream(seed + i, world, held_out, {k: float(k == kind) for k in KINDS}) for i, kind in enumerate(KINDS)]
    while len(found) < count:
        new = next(streams[len(found) % len(streams)])
        found.setdefault(new.key, new)
    return list(found.values())

"""How far a run that asks for answers is, and how fast it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NoReturn

from feature_bridge.answers import Answer, Ask

PROGRESS_S = 10.0


class Progress:
    """Counts what comes from the servers, and says how fast."""

    def __init__(self, num_conversations: int):
        self.num_conversations, self.done, self.skipped = num_conversations, 0, 0
        self.answers, self.cut_off, self.under_way = 0, 0, 0
        self._began = self._shown = time.monotonic()
        self._answers_shown = 0

    def came(self, answer: Answer) -> None:
        self.answers += 1
        self.cut_off += answer.cut_off

    def counted(self, ask: Ask) -> Ask:
        async def counted(messages: list[dict[str, Any]]) -> dict[str, Any]:
            self.under_way += 1
            try:
                return await ask(messages)
            finally:
                self.under_way -= 1

        return counted

    def line(self) -> str:
        """How it goes; the first rate is since the line before."""
        now = time.monotonic()
        rate = (self.answers - self._answers_shown) / (now - self._shown)
        mean = self.answers / (now - self._began)
        self._shown, self._answers_shown = now, self.answers
        return (
            f"{self.done:,} of {self.num_conversations:,} conversations, {rate:.1f} answers/s (mean {mean:.1f}), "
            f"{self.cut_off / max(1, self.answers):.0%} cut off, {self.under_way:,} under way, {self.skipped:,} skipped"
        )

    async def say_often(self, say: Callable[[str], Any]) -> NoReturn:
        while True:
            await asyncio.sleep(PROGRESS_S)
            say(self.line())

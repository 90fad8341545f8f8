"""The target's answers: a journal of them, how a conversation gets them, and the record with them."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feature_bridge import conversations
from feature_bridge.conversations import Conversation, num_unasked
from feature_bridge.media_parts import PartWriter
from feature_bridge.record_keys import COLUMNS, LOSS_KEYS, looks_like
from feature_bridge.sources import Source

_CUT_OFF = "the answer was cut off (length)"
_REWRITTEN = ("messages", "conversations", "system", *itertools.chain(*COLUMNS.values()), *LOSS_KEYS)  # in the turns


@dataclass(frozen=True)
class Answer:
    """One assistant turn; `error`: why the server refused it, and the conversation ends before it."""

    row: int
    turn: int  # among the assistant's
    content: str = ""
    reasoning: str = ""
    error: str = ""

    @property
    def cut_off(self) -> bool:
        return self.error.startswith(_CUT_OFF)  # as the journals of earlier versions say it, too


class Journal:
    """Answers so far, one JSON object a line, the first of them the identity of what is being answered."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Open and read a journal, or begin one.

        Raises ValueError: it belongs to other data or other sampling, or another run is writing it.
        """
        self.answers: dict[tuple[int, int], Answer] = {}
        self._file = path.open("ab", buffering=0)  # every line is the kernel's at once: SIGKILL loses none
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another run; wait for it, or end it") from None
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # a killed run may have left half a line
        if whole and (found := json.loads(whole[0])) != identity:
            wrong = next(name for name in identity if found.get(name) != identity[name])
            raise ValueError(
                f"{path} was begun with {wrong}={found.get(wrong)!r} and not {identity[wrong]!r}; "
                "finish it as it was begun, or remove it to start anew"
            )
        for line in whole[1:]:
            answer = Answer(**json.loads(line))
            self.answers[answer.row, answer.turn] = answer
        self._file.truncate(sum(map(len, whole)))
        if not whole:
            self._file.write(line_of(identity))

    def add(self, answer: Answer) -> None:
        self.answers[answer.row, answer.turn] = answer
        self._file.write(line_of(asdict(answer)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def line_of(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> str:
    """What a column of a `datasets` folder may hold and JSON does not know: times, bytes, decimals."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# --- a conversation ---------------------------------------------------------------------------------------------------

Ask = Callable[[list[dict[str, Any]]], Awaitable[dict[str, Any]]]  # messages -> the first choice of a completion


def read(source: Source, row: int) -> tuple[Any, Conversation, bool]:
    """A record, its conversation, and whether that ends with a question, which then has an empty answer.

    Raises SampleError: it cannot be read.
    """
    record, asked = conversations.with_answer(source.read(row))
    return record, conversations.parse(record, source.where(row), source.folder), asked


async def answer_conversation(
    conversation: Conversation, row: int, journal: Journal, ask: Ask, came: Callable[[Answer], Any]
) -> None:
    """Ask for every answer that the journal has not, and tell `came`; ends early where one is refused or cut off."""
    history: list[dict[str, Any]] = []
    parts, turn, unasked = PartWriter(conversation), 0, num_unasked(conversation.messages)
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or index < unasked:
            history.append({"role": message["role"], "content": parts.content(message["content"])})
            continue
        answer = journal.answers.get((row, turn))
        if answer is None:
            answer = read_choice(row, turn, await ask(history))
            journal.add(answer)
            came(answer)
        if answer.error:
            return
        history.append({"role": "assistant", "content": answer.content})
        turn += 1


def read_choice(row: int, turn: int, choice: dict[str, Any]) -> Answer:
    """An answer the target ended by itself, or why there is none. One that was cut off would teach a wrong end."""
    if "error" in choice:
        return Answer(row, turn, error=choice["error"])
    message = choice["message"]
    if (why := choice.get("finish_reason")) == "length":
        return Answer(row, turn, error=f"{_CUT_OFF}; raise --max-tokens")
    if why != "stop":
        return Answer(row, turn, error=f"the answer ended by {why!r} and not by itself")
    if not message.get("content"):
        return Answer(row, turn, error="the answer is empty")
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""  # SGLang's name, and vLLM's
    return Answer(row, turn, message["content"], thoughts)


def rewritten(record: dict[str, Any], conversation: Conversation, answers: Sequence[Answer], folder: Path) -> Any:
    """The record with the target's answers, in the `messages` form; paths relative to `folder` if inside it.

    The turns end with the last answer. Other fields of the record stay.
    """
    parts, given = PartWriter(conversation, folder), iter(answers)
    messages: list[dict[str, Any]] = []
    last, unasked = 0, num_unasked(conversation.messages)
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and index >= unasked:
            if (answer := next(given, None)) is None:
                break
            kept = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            kept |= {"weight": 0} if message.get("weight") == 0 else {}
            messages.append({"role": "assistant", "content": answer.content} | kept)
            last = len(messages)
        else:
            messages.append(message | {"content": parts.content(message["content"])})
    again = {key for key in conversation.ignored if looks_like(record.get(key))}  # pictures that the turns have, too
    kept = {k: v for k, v in record.items() if k not in _REWRITTEN and k not in again}
    return kept | {"messages": messages[:last]}

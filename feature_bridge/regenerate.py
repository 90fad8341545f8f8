"""Rewrites the assistant turns of a data set with the target's own answers, through an OpenAI-compatible server.

    python -m jaxdraft.regenerate --data FILE --output FILE --server http://HOST:PORT [--temperature T] ...

A draft learns to guess what its target says, so it should see what the target says: greedily, unless a temperature is
given. A conversation is answered turn by turn, every answer in the history of the next. What is answered goes at once
into OUTPUT.journal; the same command again goes on from there, whatever ended the one before. When all is answered the
journal becomes OUTPUT, in the order of the data.

Needs httpx, and neither torch nor SGLang: the server may run anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from feature_bridge import conversations
from feature_bridge.chat_server import Sampling, Server, ServerError
from feature_bridge.conversations import Conversation, num_unasked
from feature_bridge.media import SampleError
from feature_bridge.media_parts import PartWriter
from feature_bridge.sources import Source, open_source

PROGRESS_S = 10.0
_REWRITTEN = ("messages", "conversations", "images", "image", "videos", "video", "system")


@dataclass(frozen=True)
class Answer:
    """One assistant turn; `error`: why the server refused it, and the conversation ends before it."""

    row: int
    turn: int  # among the assistant's
    content: str = ""
    reasoning: str = ""
    error: str = ""


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
            self._file.write(_line(identity))

    def add(self, answer: Answer) -> None:
        self.answers[answer.row, answer.turn] = answer
        self._file.write(_line(asdict(answer)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> str:
    """What a column of a `datasets` folder may hold and JSON does not know: times, bytes, decimals."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# --- a conversation ---------------------------------------------------------------------------------------------------

Ask = Callable[[list[dict[str, Any]]], Awaitable[dict[str, Any]]]  # messages -> the first choice of a completion


async def answer_conversation(conversation: Conversation, row: int, journal: Journal, ask: Ask) -> None:
    """Ask for every answer that the journal has not; ends early where one is refused or cut off."""
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
        if answer.error:
            return
        history.append({"role": "assistant", "content": answer.content})
        turn += 1


def read_choice(row: int, turn: int, choice: dict[str, Any]) -> Answer:
    """An answer the target ended by itself, or why there is none. One that was cut off would teach a wrong end."""
    if "error" in choice:
        return Answer(row, turn, error=choice["error"])
    message = choice["message"]
    if choice.get("finish_reason") != "stop":
        return Answer(row, turn, error=f"the answer was cut off ({choice.get('finish_reason')}); raise --max-tokens")
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
    kept = {k: v for k, v in record.items() if k not in _REWRITTEN}
    return kept | {"messages": messages[:last]}


# --- the run ----------------------------------------------------------------------------------------------------------


async def regenerate(
    source: Source, output: Path, journal: Journal, ask: Ask, *, concurrency: int, say: Callable[[str], Any]
) -> dict[str, int]:
    """Answer everything that is not answered, `concurrency` conversations at a time, then write `output`; counts.

    Raises:
      ServerError: the server could not be used. Everything that was answered is in the journal.
    """
    rows = iter(range(len(source)))
    skipped: dict[int, str] = {}
    done = 0
    began = shown = time.monotonic()
    first = len(journal.answers)

    async def work() -> None:
        nonlocal done, shown
        for row in rows:  # shared: each row is taken once
            try:
                conversation = conversations.parse(source.read(row), source.where(row), source.folder)
                await answer_conversation(conversation, row, journal, ask)
            except SampleError as error:
                skipped[row] = error.reason
            done += 1
            if time.monotonic() - shown > PROGRESS_S:
                shown = time.monotonic()
                rate = (len(journal.answers) - first) / (shown - began)
                say(f"{done:,} of {len(source):,} conversations, {rate:.1f} answers/s, {len(skipped):,} skipped")

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return write_output(source, output, journal, skipped)


def write_output(source: Source, output: Path, journal: Journal, skipped: dict[int, str]) -> dict[str, int]:
    """OUTPUT and OUTPUT.skipped from a complete journal, in the order of the data, whole or not at all."""
    lost: list[dict[str, str]] = []
    counts = {"conversations": 0, "answers": 0, "skipped": 0, "shortened": 0}
    scratch = output.with_name(f".{output.name}.writing")
    with scratch.open("wb") as file:
        for row in range(len(source)):
            answers = []
            while (answer := journal.answers.get((row, len(answers)))) is not None and not answer.error:
                answers.append(answer)
            reason = skipped.get(row) or (answer.error if answer is not None else "")
            if not answers:
                lost.append({"where": source.where(row), "reason": reason})
                counts["skipped"] += 1
                continue
            record = source.read(row)
            conversation = conversations.parse(record, source.where(row), source.folder)
            file.write(_line(rewritten(record, conversation, answers, output.resolve().parent)))
            counts["conversations"] += 1
            counts["answers"] += len(answers)
            counts["shortened"] += bool(reason)
        file.flush()
        os.fsync(file.fileno())
    if lost:
        output.with_name(f"{output.name}.skipped").write_bytes(b"".join(map(_line, lost)))
    os.replace(scratch, output)
    return counts


# --- the command ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def make_parser() -> Parser:
    parser = Parser(prog="python -m jaxdraft.regenerate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="JSONL file or `datasets.save_to_disk` folder")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--server", required=True, metavar="URL", help="an OpenAI-compatible server, e.g. SGLang's")
    parser.add_argument("--model", help="name of the model there; default: the first one served")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling; default: 0, greedy")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="share of probability to sample from; default: 1, all tokens"
    )
    what = "limit of an answer; one that is cut off is left out; default: %(default)s"
    parser.add_argument("--max-tokens", type=int, default=2048, help=what)
    parser.add_argument("--concurrency", type=int, default=64, help="conversations at a time; default: %(default)s")
    parser.add_argument("--retries", type=int, default=6, help="of a failed request; default: %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that one answer may take; default: %(default)s"
    )
    parser.add_argument(
        "--extra",
        type=json.loads,
        default={},
        metavar="JSON",
        help='more fields of every request, e.g. \'{"chat_template_kwargs": {"enable_thinking": false}}\'',
    )
    parser.add_argument(  # jaxdraft.regenerate takes it out
        "--python",
        metavar="PATH",
        help="interpreter of the bridge's environment, which does the work; default: this one",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError: an impossible value, or an output that is there already."""
    if args.concurrency < 1 or args.max_tokens < 1 or args.retries < 0 or not 0 <= args.temperature < math.inf:
        raise ValueError("--concurrency and --max-tokens are at least 1, --retries and --temperature at least 0")
    if not 0 < args.top_p <= 1 or not args.timeout > 0:
        raise ValueError("--top-p is above 0 and at most 1, --timeout above 0")
    try:
        known = urlsplit(args.server).scheme in ("http", "https") and urlsplit(args.server).port != 0
    except ValueError:  # no such port
        known = False
    if not known:
        raise ValueError(f"--server {args.server} is not a URL; give http://HOST:PORT")
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already; remove it, or give another name")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 after an error, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    problem: BaseException | None = None
    stopped = False
    try:
        check_arguments(args)
        print(json.dumps(asyncio.run(_run(args))))
    except* (ValueError, ServerError) as errors:
        problem = errors
    except* KeyboardInterrupt:
        stopped = True
    if stopped:
        _say("stopped; the same command goes on from the last answer")
        return 130
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
    return 0 if problem is None else 2


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


async def _run(args: argparse.Namespace) -> dict[str, int]:
    source = open_source(args.data, "--data")
    key = os.environ.get("OPENAI_API_KEY")
    options = {"retries": args.retries, "timeout_s": args.timeout, "api_key": key}
    model = args.model
    if model is None:
        async with Server(args.server, Sampling(model=""), **options) as server:
            model = await server.model()
    sampling = Sampling(
        model=model,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        extra=args.extra,
    )
    path = args.output.with_name(f"{args.output.name}.journal")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        opened = Journal(path, {"data": source.digest, **asdict(sampling)})
    except OSError as error:
        why = error.strerror
        raise ValueError(f"--output {args.output} cannot be written ({why}); give another file") from error
    with opened as journal:
        if journal.answers:
            _say(f"{len(journal.answers):,} answers are in {path} already")
        async with Server(args.server, sampling, **options) as server:
            options = {"concurrency": args.concurrency, "say": _say}
            counts = await regenerate(source, args.output, journal, server.ask, **options)
    path.unlink()
    return counts


if __name__ == "__main__":
    sys.exit(main())

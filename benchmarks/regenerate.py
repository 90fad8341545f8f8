"""How fast `jaxdraft.regenerate` asks: `python -m benchmarks.regenerate [--concurrency 512 --seconds 20] [--quick]`.

Without --server the other side is `benchmarks.regenerate_fake`, a process of its own that answers every request after
--delay seconds with 320 tokens, so what is measured is the client: it cannot get more than concurrency / delay answers
a second, and its processor time for an answer says what it could. With --server (again for several) and --data the
prompts of a file are answered by a real server, over and over. The client is regenerate's own, with reading, parsing
and a journal. Prints a table of Markdown, for RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge.answer_progress import Progress
from feature_bridge.answers import Journal
from feature_bridge.chat_server import Sampling, ServerError, Servers
from feature_bridge.regenerate import allow_open_files, answer_all
from feature_bridge.sources import Source, open_source

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What can you tell me about it, and why is it so? Please answer in a few sentences. " * 3


@dataclass(frozen=True)
class Prompts:
    """More rows than can be asked: those of a source over and over, or made up."""

    source: Source | None = None
    folder: Path = Path()

    def __len__(self) -> int:
        return sys.maxsize

    def where(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Any:
        if self.source is not None:
            return self.source.read(row % len(self.source))
        return {"messages": [{"role": "user", "content": f"{row}. {PROMPT}"}]}


@contextlib.contextmanager
def fake_server(delay_s: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.regenerate_fake", "--delay", str(delay_s)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True, kw_only=True)
class Measured:
    answers: int
    tokens: int
    cut_off: int
    seconds: float
    cpu_seconds: float

    def row(self, what: str, concurrency: int) -> str:
        rates = f"{self.answers / self.seconds:,.0f} | {self.tokens / self.seconds:,.0f}"
        cpu = 1e3 * self.cpu_seconds / max(1, self.answers)
        share = self.cpu_seconds / self.seconds
        cut_off = self.cut_off / max(1, self.answers)
        return f"| {what} | {concurrency:,} | {rates} | {cpu:.2f} ms | {share:.0%} | {cut_off:.0%} |"


HEADER = (
    "| server | requests at a time | answers/s | tokens/s | client's CPU, an answer | share of a core | cut off |\n"
    "|---|---|---|---|---|---|---|"
)


async def measure(args: argparse.Namespace, urls: Sequence[str], source: Source, journal: Journal) -> Measured:
    """Asks for --seconds; the first --warm-up of them, while connections open, are not counted."""
    key = os.environ.get("OPENAI_API_KEY")
    async with Servers(urls, retries=6, timeout_s=600.0, api_key=key) as servers:
        sampling = Sampling(model=await servers.model(args.model), max_tokens=args.max_tokens)
        progress = Progress(len(source))
        ask = functools.partial(servers.ask, sampling)
        asking = asyncio.create_task(answer_all(source, journal, ask, progress, concurrency=args.concurrency))
        try:
            await asyncio.wait([asking], timeout=args.warm_up)
            begin = now(progress, servers)
            await asyncio.wait([asking], timeout=args.seconds)
            end = now(progress, servers)
        finally:
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking  # raises what ended it early
        return Measured(**{name: end[name] - begin[name] for name in end})


def now(progress: Progress, servers: Servers) -> dict[str, float]:
    counts = {"answers": progress.answers, "tokens": servers.num_tokens, "cut_off": progress.cut_off}
    return counts | {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regenerate", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=512, help="requests at a time; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="that are measured; default: %(default)s")
    parser.add_argument("--warm-up", type=float, default=5.0, metavar="S", help="seconds before; default: %(default)s")
    parser.add_argument(
        "--delay", type=float, default=1.0, metavar="S", help="of the fake server; default: %(default)s"
    )
    parser.add_argument("--server", action="append", default=[], metavar="URL", help="a real one, with --data")
    parser.add_argument("--data", help="conversations or prompts for the real one")
    parser.add_argument("--model", help="name of the model there; default: the first one served")
    parser.add_argument("--max-tokens", type=int, default=320, help="of an answer; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="does it work? 16 requests at a time, 1 second")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    if args.quick:
        args.concurrency, args.seconds, args.warm_up, args.delay = 16, 1.0, 0.5, 0.05
    try:
        if bool(args.server) != bool(args.data):
            raise ValueError("--server and --data belong together: a real server, and what it is asked")
        allow_open_files(args.concurrency + 64)
        source = Prompts(open_source(args.data, "--data")) if args.data else Prompts()
        with contextlib.ExitStack() as stack:
            urls = args.server or [stack.enter_context(fake_server(args.delay))]
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            journal = stack.enter_context(Journal(Path(folder) / "journal", {}))
            measured = asyncio.run(measure(args, urls, source, journal))
    except* (ValueError, ServerError) as errors:
        problem = errors
        while isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    print(f"{HEADER}\n{measured.row(', '.join(args.server) or f'fake, {args.delay:g} s', args.concurrency)}")
    return int(measured.answers == 0)


if __name__ == "__main__":
    sys.exit(main())

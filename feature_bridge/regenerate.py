"""Writes the assistant turns of a data set with the target's own answers, through OpenAI-compatible servers.

    python -m jaxdraft.regenerate --data FILE --output FILE --server http://HOST:PORT [--temperature T] ...

A draft learns to guess what its target says, so it should see what the target says: greedily, unless a temperature is
given. A conversation is answered turn by turn, every answer in the history of the next; a question at its end is
answered too, so a file of prompts alone will do. What is answered goes at once into OUTPUT.journal; the same command
again goes on from there, whatever ended the one before. When all is answered the journal becomes OUTPUT, in the order
of the data.

Needs aiohttp, and neither torch nor SGLang: the servers may run anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from feature_bridge import answers
from feature_bridge.answer_progress import Progress
from feature_bridge.answers import Ask, Journal, line_of
from feature_bridge.chat_server import Sampling, ServerError, Servers
from feature_bridge.media import SampleError
from feature_bridge.sources import Source, open_source

_OTHER_FILES = 64  # that are open besides a connection for each conversation
# From the source of SGLang 0.5.14: entrypoints/http_server.py, entrypoints/openai/serving_chat.py, server_args.py,
# managers/schedule_policy.py. Its --num-continuous-decode-steps is read nowhere, --stream-interval is for streams
# alone, and chat requests are tokenized before --enable-tokenizer-batch-encode would do it.
_EPILOG = """\
SGLang (0.5.14), started for hundreds of short answers a second by a small model:
  --tokenizer-worker-num 8         one process parses requests, fills the chat template and tokenizes; 8 share that
                                   (and the server then has no --api-key)
  --cuda-graph-max-bs-decode 1024  a larger batch decodes without a CUDA graph; the default of one H200 is 256
  --log-level-http warning         no line of log for every answer
and --concurrency 1024 here. A request waits until --max-tokens more tokens fit into the KV cache, beside a share of
what those that run may still write: for a model that fills the GPU lower --max-tokens, or give
--schedule-conservativeness 0.3. One scheduler uses one core: if that is full and the GPU is not, start several
servers, on one GPU each with its part of it (--mem-fraction-static), and give each as a --server.
"""


# --- the run ----------------------------------------------------------------------------------------------------------


async def answer_all(
    source: Source, journal: Journal, ask: Ask, progress: Progress, *, concurrency: int
) -> dict[int, str]:
    """Answers everything that the journal has not, `concurrency` conversations at a time; what cannot be read, and why.

    Raises:
      ServerError: the servers could not be used. Everything that was answered is in the journal.
    """
    rows = iter(range(len(source)))
    skipped: dict[int, str] = {}
    ask = progress.counted(ask)

    async def work() -> None:
        for row in rows:  # shared: each row is taken once
            try:
                _, conversation, _ = answers.read(source, row)
                await answers.answer_conversation(conversation, row, journal, ask, progress.came)
            except SampleError as error:
                skipped[row] = error.reason
                progress.skipped += 1
            progress.done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(source))):
            group.create_task(work())
    return skipped


async def regenerate(
    source: Source, output: Path, journal: Journal, ask: Ask, *, concurrency: int, say: Callable[[str], Any]
) -> dict[str, int]:
    """Answers everything that is not answered, then writes `output`; counts. Raises what the two steps raise."""
    progress = Progress(len(source))
    saying = asyncio.create_task(progress.say_often(say))
    try:
        skipped = await answer_all(source, journal, ask, progress, concurrency=concurrency)
    finally:
        saying.cancel()
    if progress.answers:
        say(progress.line())
    return write_output(source, output, journal, skipped)


def write_output(source: Source, output: Path, journal: Journal, skipped: dict[int, str]) -> dict[str, int]:
    """OUTPUT and OUTPUT.skipped from a complete journal, in the order of the data, whole or not at all.

    Raises ValueError: there is not one answer to write.
    """
    lost: list[dict[str, str]] = []
    counts = {"conversations": 0, "answers": 0, "prompts": 0, "skipped": 0, "cut_off": 0, "shortened": 0}
    scratch = output.with_name(f".{output.name}.writing")
    with scratch.open("wb") as file:
        for row in range(len(source)):
            given = []
            while (answer := journal.answers.get((row, len(given)))) is not None and not answer.error:
                given.append(answer)
            reason = skipped.get(row) or (answer.error if answer is not None else "")
            counts["cut_off"] += answer is not None and answer.cut_off
            if not given:
                lost.append({"where": source.where(row), "reason": reason or "there is no question to answer"})
                counts["skipped"] += 1
                continue
            record, conversation, asked = answers.read(source, row)
            file.write(line_of(answers.rewritten(record, conversation, given, output.resolve().parent)))
            counts["conversations"] += 1
            counts["answers"] += len(given)
            counts["prompts"] += asked and not reason
            counts["shortened"] += bool(reason)
        file.flush()
        os.fsync(file.fileno())
    if lost:
        output.with_name(f"{output.name}.skipped").write_bytes(b"".join(map(line_of, lost)))
    if not counts["conversations"]:
        scratch.unlink()
        why = "{where}: {reason}".format(**lost[0]) if lost else "the data has no conversation"
        raise ValueError(f"not one answer was obtained ({why}); the journal is kept, remove it to ask anew")
    os.replace(scratch, output)
    return counts


# --- the command ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m jaxdraft.regenerate",
        description=__doc__.splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, help="JSONL file or `datasets.save_to_disk` folder")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument(
        "--server",
        required=True,
        action="append",
        metavar="URL",
        help="an OpenAI-compatible server, e.g. SGLang's; several, of one model, share the work: again, or by commas",
    )
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


def server_urls(given: Sequence[str]) -> list[str]:
    """The addresses, each of them once."""
    return list(dict.fromkeys(url.strip().rstrip("/") for part in given for url in part.split(",")))


def allow_open_files(number: int) -> None:
    """Every request under way has a connection. Raises ValueError: the system allows fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) and soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < number:
        raise ValueError(f"--concurrency needs {number:,} open files and {hard:,} are allowed; lower it (ulimit -Hn)")
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError: an impossible value, or an output that is there already."""
    if args.concurrency < 1 or args.max_tokens < 1 or args.retries < 0 or not 0 <= args.temperature < math.inf:
        raise ValueError("--concurrency and --max-tokens are at least 1, --retries and --temperature at least 0")
    if not 0 < args.top_p <= 1 or not args.timeout > 0:
        raise ValueError("--top-p is above 0 and at most 1, --timeout above 0")
    for url in server_urls(args.server):
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no such port
            known = False
        if not known:
            raise ValueError(f"--server {url} is not a URL; give http://HOST:PORT")
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already; remove it, or give another name")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 after an error, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    problem: BaseException | None = None
    stopped = False
    try:
        check_arguments(args)
        allow_open_files(args.concurrency + _OTHER_FILES)
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
    path = args.output.with_name(f"{args.output.name}.journal")
    async with Servers(server_urls(args.server), retries=args.retries, timeout_s=args.timeout, api_key=key) as servers:
        sampling = Sampling(
            model=await servers.model(args.model),
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_tokens,
            extra=args.extra,
        )
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            opened = Journal(path, {"data": source.digest, **asdict(sampling)})
        except OSError as error:
            why = error.strerror
            raise ValueError(f"--output {args.output} cannot be written ({why}); give another file") from error
        with opened as journal:
            if journal.answers:
                _say(f"{len(journal.answers):,} answers are in {path} already")
            ask = functools.partial(servers.ask, sampling)
            counts = await regenerate(source, args.output, journal, ask, concurrency=args.concurrency, say=_say)
    path.unlink()
    return counts


if __name__ == "__main__":
    sys.exit(main())

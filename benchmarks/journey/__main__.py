"""The whole way of a user on one GPU: `python -m benchmarks.journey --target {embedded,real} [--quick] [--stages ..]`.

    regenerate  the target's own answers by SGLang's HTTP server and `jaxdraft.regenerate`, to train on and held out
    train       `jaxdraft.train`, SIGKILL of the trainer at a random step, the same command again, to its end
    evaluate    `jaxdraft.evaluate` on held-out conversations and on other tasks
    check       `jaxdraft.check`: the same blocks in every system
    convert     to speculators' form and back: the same tensors
    serve       SGLang's HTTP server with the target alone and with the draft: text, tau, tokens/s at 1, 8, 32 requests
    report      one table of what all stages left in --out

Prints Markdown, for RESULTS.md, every line when it is measured, and ends with exit code 1 if a stage fails. Options
after `--` are fields of the config, e.g. `-- --epochs 8`. A stage that is called again, by the same command, goes on
from what is there, so that a time limit loses nothing.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from benchmarks.journey import answers, drafts, report, serving, training
from benchmarks.journey.inputs import check_inputs, describe_machine
from benchmarks.journey.notes import Notes, StageError, end_all_at, save
from benchmarks.journey.settings import Journey, parse
from jaxdraft.cli import run_command

RUN: dict[str, Callable[[Journey, Notes], None]] = {
    "regenerate": answers.regenerate,
    "train": training.train,
    "evaluate": drafts.evaluate,
    "check": drafts.check,
    "convert": drafts.convert,
    "serve": serving.serve,
}


def run_stage(journey: Journey, name: str) -> Notes:
    """A stage from its first line to its last, whatever happens in it."""
    notes, began = Notes(name), time.monotonic()
    try:
        RUN[name](journey, notes)
    except StageError as error:
        notes.fail(str(error))
    except Exception as error:  # the stages after it may still say something
        notes.fail(f"{type(error).__name__}: {error}")
    notes.seconds = time.monotonic() - began
    notes.say("seconds", f"{notes.seconds:.0f}")
    save(journey.out, notes)
    return notes


def groups(stages: Sequence[str]) -> list[list[str]]:
    """Stages that run at the same time."""
    return [list(some) for _, some in groupby(stages, lambda s: "drafts" if drafts.side_by_side([s]) else s)]


def main() -> int:
    journey = parse(None, __doc__)
    out = journey.out or Path(tempfile.mkdtemp(prefix="journey-"))
    out.mkdir(parents=True, exist_ok=True)
    journey = dataclasses.replace(journey, out=out.resolve())
    check_inputs(journey)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        end_all_at(number)
    print(f"{describe_machine(journey)}\n\n| stage | what | measured |\n|---|---|---|", flush=True)
    faults: list[str] = []
    for names in groups([stage for stage in journey.stages if stage in RUN]):
        with ThreadPoolExecutor(len(names)) as pool:
            notes = list(pool.map(lambda name: run_stage(journey, name), names))
        faults += [f"{one.stage}: {fault}" for one in notes for fault in one.faults]
        if "train" in names and faults:
            break  # nothing after it would be about a draft
    if "report" in journey.stages:
        print(f"\n{report.table(journey)}", flush=True)
    for fault in faults:
        print(f"did not end well: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    run_command(main)

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
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.journey import answers, drafts, report, serving, training
from benchmarks.journey.inputs import check_inputs, describe_machine
from benchmarks.journey.notes import Notes, StageError, end_all_at, save
from benchmarks.journey.settings import Journey, parse
from jaxdraft.cli import run_command

RUN: dict[str, Callable[..., None]] = {
    "regenerate": answers.regenerate,
    "train": training.train,
    "evaluate": drafts.evaluate,
    "check": drafts.check,
    "convert": drafts.convert,
    "serve": serving.serve,
}
ONE_BY_ONE = ("regenerate", "train")  # the others need a draft, and share the GPU


def run_stage(journey: Journey, name: str, *more: Callable[[], object]) -> Notes:
    """A stage from its first line to its last, whatever happens in it."""
    notes, began = Notes(name), time.monotonic()
    try:
        RUN[name](journey, notes, *more)
    except StageError as error:
        notes.fail(str(error))
    except Exception as error:  # the stages after it may still say something
        notes.fail(f"{type(error).__name__}: {error}")
    notes.seconds = time.monotonic() - began
    notes.say("seconds", f"{notes.seconds:.0f}")
    save(journey.out, notes)
    return notes


def run_side_by_side(journey: Journey, names: Sequence[str]) -> list[Notes]:
    """What is done with a draft, at the same time; a server is measured once it has the GPU for itself."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run_stage, journey, name) for name in names if name != "serve"]
        served = [run_stage(journey, "serve", lambda: wait(jobs))] if "serve" in names else []
        return [job.result() for job in jobs] + served


def run_all(journey: Journey) -> list[str]:
    """Every stage; what did not go well. One that needs what another could not make is not run."""
    notes: list[Notes] = []
    chosen = [name for name in journey.stages if name in RUN]
    for name in filter(ONE_BY_ONE.__contains__, chosen):
        notes.append(run_stage(journey, name))
        if notes[-1].failed:
            return faults_of(notes)
    return faults_of([*notes, *run_side_by_side(journey, [name for name in chosen if name not in ONE_BY_ONE])])


def faults_of(notes: Sequence[Notes]) -> list[str]:
    return [f"{one.stage}: {fault}" for one in notes for fault in one.faults]


def main() -> int:
    journey = parse(None, __doc__)
    out = journey.out or Path(tempfile.mkdtemp(prefix="journey-"))
    out.mkdir(parents=True, exist_ok=True)
    journey = dataclasses.replace(journey, out=out.resolve())
    check_inputs(journey)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        end_all_at(number)
    print(f"{describe_machine(journey)}\n\n| stage | what | measured |\n|---|---|---|", flush=True)
    faults = run_all(journey)
    if "report" in journey.stages:
        print(f"\n{report.table(journey)}", flush=True)
        faults = report.faults(journey)  # of earlier calls as well
    for fault in faults:
        print(f"did not end well: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    run_command(main)

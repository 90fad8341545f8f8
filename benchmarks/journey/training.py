"""The stage `train`: the trainer is killed at a random step, and the same command trains to the end."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.bridge_run import gpu_in_use
from benchmarks.journey.notes import Notes, StageError, end_tree, log_of, start, timed, why
from benchmarks.journey.settings import Journey

POLL_S = 0.02
FREED_S, SLACK_MIB = 60.0, 512  # for the GPU's memory to be what it was before the run
SHARE = (0.05, 0.60)  # of the steps, between which the trainer is killed

Losses = dict[int, float]


def train(journey: Journey, notes: Notes) -> None:
    command = [sys.executable, "-m", "jaxdraft.train", "--config", journey.target.config, *journey.config_fields]
    known = journey.out / "killed.json"
    if not known.is_file():
        shutil.rmtree(journey.run_dir, ignore_errors=True)  # of a stage that was ended before the kill
        losses = killed(journey, notes, command)
        first = max(checkpoints(journey.run_dir)) + 1
        known.write_text(json.dumps({"first": first, "losses": losses, "found": notes.found()}))
    else:
        notes.again(json.loads(known.read_text())["found"])
    first, losses = read_killed(known)
    with timed(notes, "the same command again"):
        process = start(journey, "train-again", command)
        try:
            code = process.wait()
        finally:
            end_tree(process)
    if code != 0:
        raise StageError(f"the same command ended with exit code {code}; {why(journey, 'train-again')}")
    log = log_of(journey, "train-again").read_text(errors="replace")
    resumed = re.search(r"resuming from step (\d+)", log)
    again = read_losses(journey.run_dir / "metrics.jsonl")
    notes.require(resumed is not None, "resumed", resumed[0] if resumed else "it began anew")
    same, differing = compare(losses, again, first)
    notes.require(
        bool(same) and not differing,
        "losses of the steps that were trained twice",
        f"{len(same)} equal to the last bit, {len(differing)} differ" + (f": {differing[:5]}" if differing else ""),
    )
    summary = json.loads((journey.run_dir / "summary.json").read_text())
    steps = [step for step in range(1, summary["steps"] + 1) if step not in again]
    notes.require(not steps, "steps in metrics.jsonl", f"{len(again):,} of {summary['steps']:,}")
    notes.say("loss", ", ".join(f"{again[s]:.3f} at {s:,}" for s in marks(summary["steps"]) if s in again))
    rate = f"{summary['rows_per_second']:.1f} rows/s" if summary["rows_per_second"] else "not measured"
    notes.say("training", f"{summary['steps']:,} steps, {rate}; the last process took {summary['seconds']:.0f} s")
    notes.say("bridge", summary["target_backend"])
    notes.figures |= {"steps": summary["steps"], "summary": summary, "curve": read_curve(journey.run_dir)}
    for step, one in notes.figures["curve"]:
        notes.say(f"held out at step {step:,}", f"tau {one['tau']:.3f}, replayed {one['tau_replay']:.3f}")


def killed(journey: Journey, notes: Notes, command: list[str]) -> Losses:
    """Starts the run and kills its trainer; the losses that it had written. Raises StageError: it ended by itself."""
    import psutil

    before = gpu_in_use()
    began = time.monotonic()
    process = start(journey, "train-killed", command)
    try:
        steps = wait_for_plan(journey, process)
        kill = choose_step(steps, save_interval(journey), journey.seed)
        wait_for(journey, process, lambda: checkpoints(journey.run_dir) and last_step(journey.run_dir) >= kill)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        struck = time.monotonic()
    finally:
        end_tree(process)
    losses = read_losses(journey.run_dir / "metrics.jsonl")
    notes.say("SIGKILL", f"at step {max(losses):,} of {steps:,}, {struck - began:.0f} s after the start")
    _, alive = psutil.wait_procs(children, timeout=FREED_S)
    took = time.monotonic() - struck
    notes.require(not alive, "its bridge", f"{len(alive)} processes left" if alive else f"gone {took:.1f} s later")
    for child in alive:
        child.kill()
    if before is not None:
        while (left := gpu_in_use()) > before + SLACK_MIB and time.monotonic() - struck < FREED_S:
            time.sleep(0.1)
        free = left <= before + SLACK_MIB
        took = time.monotonic() - struck
        notes.require(free, "GPU memory after the kill", f"{left} MiB, {before} before the run, after {took:.1f} s")
    return losses


def read_killed(file: Path) -> tuple[int, Losses]:
    """The first step that was to be trained again, and the losses that the killed trainer had written."""
    known = json.loads(file.read_text())
    return known["first"], {int(step): loss for step, loss in known["losses"].items()}


def choose_step(steps: int, interval: int, seed: int) -> int:
    """A random step to kill the trainer at: within SHARE of the run, and after its first checkpoint.

    Raises StageError: the run has no such step.
    """
    low = max(round(SHARE[0] * steps), interval + 1)
    high = max(round(SHARE[1] * steps), low)
    if high >= steps:
        raise StageError(f"a run of {steps} steps saves nothing before its end; lower --save-interval {interval}")
    return random.Random(seed).randint(low, high)


def save_interval(journey: Journey) -> int:
    """Of the run's config, which it writes down before it starts its bridge."""
    return json.loads((journey.run_dir / "config.json").read_text())["save_interval"]


def compare(before: Mapping[int, float], after: Mapping[int, float], first: int) -> tuple[list[int], list[int]]:
    """Steps from `first` on that both have: those of the same loss, and the others."""
    both = sorted(step for step in before.keys() & after.keys() if step >= first)
    same = [step for step in both if before[step] == after[step]]
    return same, [step for step in both if step not in same]


def marks(steps: int) -> list[int]:
    return sorted({1, min(100, steps), steps // 2, steps} - {0})


# --- what a run has written -------------------------------------------------------------------------------------------


def wait_for_plan(journey: Journey, process: subprocess.Popen) -> int:
    """The number of steps, once the run says it."""
    found: list[str] = []

    def is_there() -> bool:
        log = log_of(journey, "train-killed").read_text(errors="replace")
        found.extend(re.findall(r"^plan .*?([\d,]+) steps of", log, re.M))
        return bool(found)

    wait_for(journey, process, is_there)
    return int(found[0].replace(",", ""))


def wait_for(journey: Journey, process: subprocess.Popen, condition: Callable[[], object]) -> None:
    while not condition():
        if (code := process.poll()) is not None:
            raise StageError(f"training ended with exit code {code}; {why(journey, 'train-killed')}")
        time.sleep(POLL_S)


def checkpoints(run_dir: Path) -> list[int]:
    """Steps that are saved whole: what is being written has another name."""
    return [int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()]


def read_metrics(file: Path, split: str) -> dict[int, dict]:
    """Lines of metrics.jsonl by step; a last line that is half written is left out."""
    lines = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["split"] == split:
            lines[entry["step"]] = entry
    return lines


def read_losses(file: Path) -> Losses:
    return {step: entry["loss"] for step, entry in read_metrics(file, "train").items()}


def read_curve(run_dir: Path) -> list[tuple[int, dict]]:
    return sorted(read_metrics(run_dir / "metrics.jsonl", "eval").items())


def last_step(run_dir: Path) -> int:
    return max(read_losses(run_dir / "metrics.jsonl"), default=0)

"""A training run with the SGLang target, watched.

    python -m benchmarks.bridge_run DIR BRIDGE_PYTHON [--hang] [--quick]

The embedded target and its pictures. 200 steps are left alone, and the memory of both processes is sampled beside them.
Then the bridge is killed (`kill -9`) and the run goes on to its end with the next one. With `--hang` it is stopped
(`kill -STOP`) after 20 steps instead, so that it lives and does nothing. Prints a table, line by line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

POLL_S = 0.02
SAMPLE_S = 1.0
PATIENCE_S = 3.0  # after the run's end, for the driver to give the memory back


class Sample(NamedTuple):
    """Memory at a step, MiB."""

    step: int
    gpu: int | None  # in use on the GPU by everybody
    trainer_gpu: int | None
    bridge_gpu: int | None
    trainer_host: int
    bridge_host: int


class Run:
    """A training process, and what is seen of it from outside."""

    def __init__(self, out: Path, name: str, python: str, steps: int, quick: bool):
        self.steps, self.log_path, self.metrics = steps, out / f"{name}-train.log", out / name / "metrics.jsonl"
        self._gpu_before, self._seen = gpu_in_use(), {}
        # Without preallocation JAX's memory would show if it grew.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command(out, name, python, steps, quick), env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def step(self) -> int:
        """The last one in metrics.jsonl."""
        try:
            return json.loads(self.metrics.read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, KeyError, ValueError):
            return 0

    @property
    def bridge(self) -> int:
        """Its bridge's process id."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self._seen |= {child.pid: child for child in children}
        return next(c.pid for c in children if "feature_bridge.server" in " ".join(c.cmdline()))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.process.poll() is not None:
                raise SystemExit(f"the trainer ended with exit code {self.process.returncode}")
            time.sleep(POLL_S)

    def strike(self, number: signal.Signals, what: str) -> None:
        """Sends the bridge a signal, and waits until training goes on with another one."""
        step, bridge = self.step, self.bridge
        struck = time.monotonic()
        os.kill(bridge, number)
        self.wait_for(lambda: self._lines("starting it again"))
        say(f"bridge {what}: noticed after", f"{time.monotonic() - struck:.2f} s, at step {step}")
        say("said", self._lines("starting it again")[-1].replace(str(self.log_path.parent), "DIR"))
        slots = 3 + 1  # filled before, and the step under way
        self.wait_for(lambda: self.step > step + slots)
        say("training goes on after", f"{time.monotonic() - struck:.0f} s")
        say("memory with the second bridge", sample(self.step, self.process.pid, self.bridge))
        told = self._lines("after the bridge's restart")
        say("embedding and head after the restart", told[-1].rpartition(": ")[2] if told else "loaded once, not mapped")

    def end(self) -> bool:
        """Waits for its end; whether that is as it should be."""
        code = self.process.wait()
        say("end of the run", f"exit code {code}, step {self.step} of {self.steps}")
        finite = say_losses(self.metrics)
        time.sleep(0 if self._gpu_before is None else PATIENCE_S)
        orphans = self.orphans()
        say("processes left", ", ".join(" ".join(orphan.cmdline()) for orphan in orphans) or "none")
        if self._gpu_before is not None:
            say("MiB in use on the GPU before the run, after it", f"{self._gpu_before}, {gpu_in_use()}")
        return code == 0 and self.step == self.steps and finite and not orphans

    def orphans(self) -> list[psutil.Process]:
        """Of the processes that it had started, those that still run (a zombie does not)."""
        return [p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> None:
        """Ends what is left of it, a stopped bridge as well."""
        for process in (self.process, *self.orphans()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _lines(self, text: str) -> list[str]:
        return [line for line in self.log_path.read_text(errors="replace").splitlines() if text in line]


def command(out: Path, name: str, python: str, steps: int, quick: bool) -> list[str]:
    words = [sys.executable, "-m", "jaxdraft.train", "--config", "tiny_qwen35vl.py", "--output-dir", str(out)]
    words += ["--name", name, "--max-steps", str(steps), "--epochs", "200", "--log-interval", "1"]
    words += ["--eval-interval", "100000", "--data.eval-rows", "4", "--save-interval", str(max(steps // 2, 1))]
    words += ["--num-decode", "0", "--no-check-first-checkpoint", "--data.cache-dir", str(out / "cache")]
    words += ["--bridge.python", python, "--bridge.restarts", "1"]
    if quick:
        return [*words, "--target.backend", "huggingface", "--draft.num-layers", "1"]
    words += ["--bridge.transport", "cuda_ipc", "--target.backend", "sglang", "--target.dtype", "bfloat16"]
    words += ["--compute-dtype", "bfloat16", "--trainer.memory-fraction", "0.2", "--bridge.memory-fraction", "0.2"]
    return words


def main(out: Path, python: str, hang: bool, quick: bool) -> None:
    calm, after = (4, 10) if quick else (20 if hang else 200, 40)
    start, run = time.monotonic(), Run(out, "hang" if hang else "run", python, calm + after, quick)
    try:
        run.wait_for(lambda: run.step >= 1)
        say("first step after", f"{time.monotonic() - start:.0f} s")
        if hang:
            run.wait_for(lambda: run.step >= calm)
            run.strike(signal.SIGSTOP, "stopped (SIGSTOP)")
        else:
            watch(run, calm)
            run.strike(signal.SIGKILL, "killed (SIGKILL)")
        good = run.end()
    finally:
        run.stop()
    if not good:
        sys.exit(1)


def watch(run: Run, calm: int) -> None:
    """Time, losses and memory of the steps up to `calm`."""
    samples, bridge = [], run.bridge
    first, first_at = run.step, time.monotonic()
    while (step := run.step) < calm and run.process.poll() is None:
        samples.append(sample(step, run.process.pid, bridge))
        time.sleep(SAMPLE_S)
    if step > first:
        say("a step", f"{1000 * (time.monotonic() - first_at) / (step - first):.0f} ms, mean of {step - first}")
    say_losses(run.metrics)
    say_memory(samples, calm)


def say(name: str, value: Any) -> None:
    print(f"| {name} | {value} |", flush=True)


def say_losses(metrics: Path) -> bool:
    """Whether all are finite."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    finite = all(map(math.isfinite, losses))
    say(f"loss of {len(losses)} steps", f"first tenth {first:.3f}, last tenth {last:.3f}; all finite: {finite}")
    return finite


def say_memory(samples: list[Sample], calm: int) -> None:
    """Growth from the tenth of the run on (everything is compiled by then) to its end."""
    warm = [s for s in samples if s.step >= calm // 10] or samples
    for name in Sample._fields[1:]:
        values = [getattr(s, name) for s in warm if getattr(s, name) is not None]
        if values:
            some = values[:: max(1, len(values) // 8)]
            say(f"MiB, {name.replace('_', ', ')}", f"{some}; growth {values[-1] - values[0]}, largest {max(values)}")
        else:
            say(f"MiB, {name.replace('_', ', ')}", "not seen")


def sample(step: int, trainer: int, bridge: int) -> Sample:
    by_process = gpu_by_process()
    return Sample(
        step, gpu_in_use(), by_process.get(trainer), by_process.get(bridge), host_memory(trainer), host_memory(bridge)
    )


def host_memory(pid: int) -> int:
    """MiB of the process that are its own."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return (memory.rss - memory.shared) >> 20


def gpu_in_use() -> int | None:
    lines = smi("--query-gpu=memory.used")
    return int(lines[0]) if lines else None


def gpu_by_process() -> dict[int, int]:
    pairs = (line.split(",") for line in smi("--query-compute-apps=pid,used_memory"))
    return {int(pid): int(used) for pid, used in pairs if used.strip().isdigit()}


def smi(query: str) -> list[str]:
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge_run", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("python")
    parser.add_argument("--hang", action="store_true", help="stop the bridge instead of killing it")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    main(args.out, args.python, args.hang, args.quick)

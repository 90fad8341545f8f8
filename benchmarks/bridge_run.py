"""A training run with the SGLang target, watched: `python -m benchmarks.bridge_run DIR BRIDGE_PYTHON [--quick]`.

The embedded target and its pictures. 200 steps are left alone, and the memory of both processes is sampled beside them.
Then the bridge is killed (`kill -9`) and the run goes on to its end with the next one. Prints a table, line by line.
"""

from __future__ import annotations

import argparse
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


def command(out: Path, python: str, steps: int, quick: bool) -> list[str]:
    words = [sys.executable, "-m", "jaxdraft.train", "--config", "tiny_qwen35vl.py", "--output-dir", str(out)]
    words += ["--name", "run", "--max-steps", str(steps), "--epochs", "200", "--log-interval", "1"]
    words += ["--eval-interval", "100000", "--data.eval-rows", "4", "--save-interval", str(max(steps // 2, 1))]
    words += ["--num-decode", "0", "--no-check-first-checkpoint", "--data.cache-dir", str(out / "cache")]
    words += ["--bridge.python", python, "--bridge.restarts", "1"]
    if quick:
        return [*words, "--target.backend", "huggingface"]
    words += ["--bridge.transport", "cuda_ipc", "--target.backend", "sglang", "--target.dtype", "bfloat16"]
    words += ["--compute-dtype", "bfloat16", "--trainer.memory-fraction", "0.4", "--bridge.memory-fraction", "0.3"]
    return words


def main(out: Path, python: str, quick: bool) -> None:
    calm, after = (4, 10) if quick else (200, 40)
    metrics, log_path = out / "run" / "metrics.jsonl", out / "run-train.log"
    before, samples = gpu_in_use(), []
    # Without preallocation JAX's memory would show if it grew.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    start = time.monotonic()
    with log_path.open("w") as log:
        trainer = subprocess.Popen(
            command(out, python, calm + after, quick), env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait(trainer, lambda: last_step(metrics) >= 1)
        say("first step after", f"{time.monotonic() - start:.0f} s")
        bridge = bridge_of(trainer.pid)
        first, first_at = last_step(metrics), time.monotonic()
        while (step := last_step(metrics)) < calm and trainer.poll() is None:
            samples.append(sample(step, trainer.pid, bridge))
            time.sleep(SAMPLE_S)
        if step > first:
            say("a step", f"{1000 * (time.monotonic() - first_at) / (step - first):.0f} ms, mean of {step - first}")
        say_losses(metrics)
        say_memory(samples, calm)

        killed_at, step_killed = time.monotonic(), last_step(metrics)
        os.kill(bridge, signal.SIGKILL)
        wait(trainer, lambda: "starting it again" in log_path.read_text())
        say("bridge killed (SIGKILL): noticed after", f"{time.monotonic() - killed_at:.2f} s, at step {step_killed}")
        slots = 3 + 1  # filled before, and the step under way
        wait(trainer, lambda: last_step(metrics) > step_killed + slots)
        say("training goes on after", f"{time.monotonic() - killed_at:.0f} s")
        say("memory with the second bridge", sample(last_step(metrics), trainer.pid, bridge_of(trainer.pid)))
        told = [line for line in log_path.read_text().splitlines() if "after the bridge's restart" in line]
        say("embedding and head after the restart", told[-1].rpartition(": ")[2] if told else "loaded once, not mapped")
        code = trainer.wait()
        say("end of the run", f"exit code {code}, step {last_step(metrics)} of {calm + after}")
        say_losses(metrics)
        time.sleep(PATIENCE_S)
        say("MiB in use on the GPU before the run, after it", f"{before}, {gpu_in_use()}")
    finally:
        if trainer.poll() is None:
            trainer.terminate()
    if code:
        sys.exit(1)


def say(name: str, value: Any) -> None:
    print(f"| {name} | {value} |", flush=True)


def say_losses(metrics: Path) -> None:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    finite = all(map(math.isfinite, losses))
    say(f"loss of {len(losses)} steps", f"first tenth {first:.3f}, last tenth {last:.3f}; all finite: {finite}")


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


def last_step(metrics: Path) -> int:
    try:
        return json.loads(metrics.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, KeyError, ValueError):
        return 0


def bridge_of(trainer: int) -> int:
    children = psutil.Process(trainer).children(recursive=True)
    return next(c.pid for c in children if "feature_bridge.server" in " ".join(c.cmdline()))


def wait(trainer: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        if trainer.poll() is not None:
            raise SystemExit(f"the trainer ended with exit code {trainer.returncode}")
        time.sleep(POLL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge_run", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("python")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    main(args.out, args.python, args.quick)

"""Small real runs for the tests: the embedded target, a few of its conversations, a one-layer draft, seconds long."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"


def write_data(directory: Path, *, train: int = 24, held_out: int = 6) -> Path:
    """`train.jsonl` and `eval.jsonl` with the first conversations of the embedded data; pictures by absolute path."""
    for name, number in (("train", train), ("eval", held_out)):
        with (TINY / f"{name}.jsonl").open() as source:
            lines = [line.replace("pictures/", f"{TINY}/pictures/") for line in itertools.islice(source, number)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def write_config(directory: Path, body: str = "") -> Path:
    """A config of a run of 9 steps over `write_data`'s files. `body` is put before `return config`."""
    file = directory / "small.py"
    file.write_text(
        f"""
import dataclasses
from jaxdraft.config import *

def get_config():
    config = Config(
        name="small",
        output_dir={str(directory / "runs")!r},
        target=TargetConfig(path={str(TINY / "target")!r}, dtype="float32", backend="huggingface"),
        data=DataConfig(train_path={str(directory / "train.jsonl")!r}, eval_path={str(directory / "eval.jsonl")!r},
                        eval_rows=2, row_tokens=512, num_workers=1, cache_dir={str(directory / "cache")!r}),
        draft=DraftOptions(num_layers=1, block_size=4, intermediate_size=64),
        bridge=BridgeConfig(num_slots=3, verify=False),
        anchors_per_row=24, compute_dtype="float32", epochs=6, max_steps=9,
        save_interval=2, eval_interval=4, log_interval=1, num_decode=0,
    )
    {body or "pass"}
    return config
"""
    )
    return file


def start(config: Path, *args: str, **env: str) -> subprocess.Popen:
    """`python -m jaxdraft.train` in a process of its own; one thread a library, so that sums have one order."""
    environment = os.environ | {"XLA_FLAGS": "", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"} | env
    command = [sys.executable, "-m", "jaxdraft.train", "--config", str(config), *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(config: Path, *args: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a whole run."""
    process = start(config, *args, **env)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def metrics(run_dir: Path, split: str = "train") -> dict[int, dict]:
    """Lines of metrics.jsonl by step; a line that is being written is left out."""
    lines = {}
    file = run_dir / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["split"] == split:
            lines[entry["step"]] = entry
    return lines


def kill_at(
    process: subprocess.Popen, run_dir: Path, step: int, *, victim: str, number: int = signal.SIGKILL
) -> tuple[int, str]:
    """Signals the trainer or its bridge once `step` is logged; the trainer's exit code and output."""
    wait_until(lambda: step in metrics(run_dir) or process.poll() is not None)
    assert process.poll() is None, f"ended before step {step}: {process.communicate()[0][-2000:]}"
    os.kill(process.pid if victim == "trainer" else bridge_of(process.pid), number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def bridge_of(trainer: int) -> int:
    """The pid of a trainer's bridge."""
    children = psutil.Process(trainer).children(recursive=True)
    return next(child.pid for child in children if "feature_bridge.server" in " ".join(child.cmdline()))


def wait_until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)

"""Small real runs for the tests: the embedded target, a few of its conversations, a one-layer draft, seconds long."""

from __future__ import annotations

import contextlib
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
from processes import popen

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
    env = {"XLA_FLAGS": "", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"} | env
    return popen([sys.executable, "-m", "jaxdraft.train", "--config", config, *args], env)


def run(config: Path, *args: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a whole run."""
    process = start(config, *args, **env)
    output, _ = process.communicate(timeout=900)
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
    wait_for_step(process, run_dir, step)
    os.kill(process.pid if victim == "trainer" else wait_for_bridge(process), number)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Waits until the log has `step` and is this process's, which has cut off what one before it logged in vain."""
    file = str(run_dir / "metrics.jsonl")

    def is_there(trainer: psutil.Process) -> bool:
        return step in metrics(run_dir) and any(opened.path == file for opened in trainer.open_files())

    _wait_for(process, is_there, f"step {step}")


def wait_for_bridge(process: subprocess.Popen) -> int:
    """The pid of a trainer's bridge (one of them, where it has several), which may have to start first."""
    pids: list[int] = []

    def is_there(trainer: psutil.Process) -> bool:
        for child in trainer.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                pids.extend([child.pid] * ("feature_bridge.server" in child.cmdline()))
        return bool(pids)

    _wait_for(process, is_there, "there was a bridge")
    return pids[0]


def _wait_for(process: subprocess.Popen, condition: Callable[[psutil.Process], bool], what: str) -> None:
    def is_over() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # as above
            return process.poll() is not None or condition(psutil.Process(process.pid))
        return False

    wait_until(is_over)
    assert process.poll() is None, f"ended before {what}: {process.communicate()[0][-2000:]}"


def wait_until(condition: Callable[[], bool], timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

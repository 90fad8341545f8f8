"""The processes of a race: each trainer's runs, one at a time, and when their steps ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.race.settings import Settings, times_file
from feature_bridge.logs import quote_file
from jaxdraft.metrics import read_lines

VARIANTS = ("sdpa,process", "sdpa,inline", "flex_attention,process")
VARIANT_LIMIT_S = 120
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a child: this project can be imported."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def call(out: Path, name: str, python: str, module: str, *arguments: str, limit_s: float = 600) -> None:
    """Runs `PYTHON -m MODULE ..`; what it prints is printed, its other output is in OUT/NAME.log.

    Raises ValueError: it failed, or ran for longer than `limit_s`; with the error in its log.
    """
    began = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        command, options = [python, "-m", module, *arguments], {"cwd": ROOT, "env": environment(), "stderr": file}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
            timer = threading.Timer(limit_s, process.kill)
            timer.start()
            for line in process.stdout:
                print(line, end="", flush=True)
        timer.cancel()
    if process.returncode:
        raise ValueError(f"{name} ended with code {process.returncode}; {quote_file(log)}")
    print(f"<!-- {name}: {time.monotonic() - began:.0f} s -->", flush=True)


def run_jaxdraft(out: Path, settings: Settings, seed: int) -> None:
    """`python -m jaxdraft.train`, as a user calls it; when its steps ended is told from its metrics.jsonl."""
    name = f"jaxdraft-{seed}"
    command = [sys.executable, "-m", "jaxdraft.train", *settings.options, "--name", name, "--seed", str(seed)]
    metrics, first, began = out / name / "metrics.jsonl", None, time.time()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--fresh"], cwd=ROOT, env=environment(), stdout=log, stderr=log)
        while process.poll() is None and first is None:
            if metrics.is_file() and metrics.stat().st_mtime > began and metrics.stat().st_size:
                first = time.time()
            time.sleep(0.005)
        code = process.wait()
    if code or first is None:
        raise ValueError(f"{name} ended with code {code}; {quote_file(out / f'{name}.log')}")
    lines = [line for line in read_lines(metrics) if line["split"] == "train"]
    if len(lines) != settings.steps:
        raise ValueError(
            f"{name} has {len(lines)} steps and not {settings.steps}, as several devices share them; let it see one, "
            "by CUDA_VISIBLE_DEVICES=0"
        )
    ended = [first]
    for line in lines[1:]:  # a step's seconds are those since the end of the one before
        ended.append(ended[-1] + line["seconds"])
    waited = sum(line["seconds_waiting"] for line in lines[1:])
    found = {"started": began, "ended": ended, "loss": [line["loss"] for line in lines], "seconds_waiting": waited}
    times_file(out, "jaxdraft", seed).write_text(json.dumps(found) + "\n")
    print(f"<!-- {name}: {time.time() - began:.0f} s -->", flush=True)


def run_specforge(out: Path, seed: int, python: str) -> None:
    began, name, module = time.time(), f"specforge-{seed}", "benchmarks.race.specforge_run"
    call(out, name, python, module, str(out), str(seed))
    found = json.loads((out / f"{name}.json").read_text())
    times_file(out, "specforge", seed).write_text(json.dumps({"started": began} | found) + "\n")


def time_variants(out: Path, settings: Settings, python: str) -> None:
    """A line for each of VARIANTS; OUT/variants.json, for the report."""
    found, module, seed = [], "benchmarks.race.specforge_run", settings.seeds[0]
    for variant in VARIANTS:
        try:
            arguments = (str(out), str(seed), "--variant", variant)
            call(out, "variant", python, module, *arguments, limit_s=VARIANT_LIMIT_S)
        except ValueError as error:
            print(f"{variant}: {error}", flush=True)
            continue
        found.append(json.loads((out / f"variant-{seed}.json").read_text()))
        print(f"{variant}: {found[-1]['ms']:.1f} ms a step, the first after {found[-1]['first']:.0f} s", flush=True)
    (out / "variants.json").write_text(json.dumps(found) + "\n")

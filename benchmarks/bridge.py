"""The bridge on a GPU, measured: `python -m benchmarks.bridge [--quick] [--parts row,run,parity,...] [--out DIR]`.

    row       hand-over of a row, capture, step, both together on one GPU, with pictures (`bridge_row`)
    run       200 training steps on the embedded pictures, SGLang target: loss, memory; a killed bridge (`bridge_run`)
    hang      a shorter run whose bridge is stopped: how soon it is noticed, what is said, what is left (`bridge_run`)
    parity    features of random Qwen3.5, Qwen3-VL, Qwen2.5-VL in SGLang against transformers (`bridge_parity`)
    mps       capture, step and together again, both processes under NVIDIA's Multi-Process Service
    peers     together again with SpecForge's density of anchors: 256 for every 768 tokens

Prints Markdown, for RESULTS.md, every line when it is measured. Every part is a process of its own with a time limit;
one that fails says so, with the end of its log, and the others go on. `--side-by-side` is for parts that no clock
depends on (run, parity). `--quick` does what a CPU can. Logs stay in DIR.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bridge_row import path_with_repository
from feature_bridge.installed import UNKNOWN, version_of
from feature_bridge.logs import excerpt, read_end

FAMILIES = ("qwen3_5", "qwen3_vl", "qwen2_5_vl")
LIMITS_S = {"row": 200, "run": 200, "hang": 150, "parity": 150, "mps": 110, "peers": 90}
SPECFORGE_ANCHORS = 4096 * 256 // 768


def call(
    out: Path,
    name: str,
    python: str,
    *args: str,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    table: bool = True,
) -> bool:
    """Runs `PYTHON -m ARGS` and prints its table's lines as they come; the end of its log where it failed."""
    log = out / f"{name}.log"
    environment = os.environ | {"PYTHONPATH": path_with_repository(), "PYTHONUNBUFFERED": "1"} | dict(env or {})
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [python, "-m", *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        ended_by: list[str] = []

        def end() -> None:
            ended_by.append("time limit")
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if table and line.startswith("| "):
                print(line, end="", flush=True)
        code: Any = process.wait()
        timer.cancel()
    code = ended_by[0] if ended_by else code
    print(f"<!-- {name}: {time.monotonic() - start:.0f} s, exit code {code} -->", flush=True)
    if code != 0:
        print(f"\n**{name} did not end well** ({code})", flush=True)
        tail(log)
    return code == 0


def row(out: Path, args: argparse.Namespace) -> None:
    if write_row(out, args):
        measure_row(out, args, "row", "hand-over,capture,step,accumulated")


def mps(out: Path, args: argparse.Namespace) -> None:
    """A daemon of our own for the two processes; no setting of the GPU is touched."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        print("no nvidia-cuda-mps-control on this machine: not measured", flush=True)
        return
    if not write_row(out, args):
        return
    env = {f"CUDA_MPS_{what}_DIRECTORY": str(out / f"mps-{what.lower()}") for what in ("PIPE", "LOG")}
    for directory in env.values():
        Path(directory).mkdir(exist_ok=True)
    subprocess.run([control, "-d"], env=os.environ | env, check=True, timeout=20)
    try:
        measure_row(out, args, "mps", "capture,step", env=env)
    finally:
        subprocess.run([control], input="quit\n", env=os.environ | env, text=True, check=False, timeout=20)
        for file in sorted((out / "mps-log").glob("*.log")):
            tail(file, 4)


def peers(out: Path, args: argparse.Namespace) -> None:
    if write_row(out, args):
        measure_row(out, args, "peers", "capture,step", "--anchors", str(64 if args.quick else SPECFORGE_ANCHORS))


def write_row(out: Path, args: argparse.Namespace) -> bool:
    """Target and data of the row's measurements, once."""
    root = out / "row"
    if (root / "train.jsonl").is_file():
        return True
    size = ("--quick",) if args.quick else ()
    return call(out, "row-write", args.bridge_python, "benchmarks.bridge_data", str(root), *size, limit_s=60)


def measure_row(
    out: Path, args: argparse.Namespace, part: str, phases: str, *more: str, env: Mapping[str, str] | None = None
) -> None:
    print("\n| what | measured |\n|---|---|", flush=True)
    command = ["benchmarks.bridge_row", str(out / "row"), args.bridge_python, "--phases", phases, *more]
    command += ["--quick"] if args.quick else []
    if not call(out, part, sys.executable, *command, limit_s=limit(args, part), env=env):
        tail(out / "row" / "bridge.log")


def run(out: Path, args: argparse.Namespace) -> None:
    watched_run(out, args, "run")


def hang(out: Path, args: argparse.Namespace) -> None:
    watched_run(out, args, "hang", "--hang")


def watched_run(out: Path, args: argparse.Namespace, name: str, *options: str) -> None:
    print("\n| what | measured |\n|---|---|", flush=True)
    command = ["benchmarks.bridge_run", str(out), args.bridge_python, *options, *(["--quick"] if args.quick else [])]
    good = call(out, name, sys.executable, *command, limit_s=limit(args, name))
    log = out / f"{name}-train.log"
    _, title, table = log.read_text(errors="replace").partition("GPU memory")
    if title:
        print(f"\n```\n{title}{table.partition('embedding and head')[0]}```", flush=True)
    if not good:
        tail(log)
        tail(out / name / "bridge.log")


def parity(out: Path, args: argparse.Namespace) -> None:
    sizes = ("tiny",) if args.quick else args.sizes.split(",")
    cases = [(family, size) for size in sizes for family in args.families.split(",")]
    deadline = time.monotonic() + limit(args, "parity")

    def python(family: str) -> str:  # SGLang 0.5.14's Qwen2.5-VL needs the transformers that it pins
        return (args.bridge_python_pinned or args.bridge_python) if family == "qwen2_5_vl" else args.bridge_python

    def one(name: str, *command: str, table: bool = False) -> bool:
        return call(out, name, *command, limit_s=max(1, deadline - time.monotonic()), table=table)

    def case(family: str, size: str) -> None:
        module, what = "benchmarks.bridge_parity", (family, size, str(out))
        if one(f"reference-{family}-{size}", python(family), module, "reference", *what):
            for dtype in args.dtypes.split(","):
                command = (python(family), module, "capture", *what, dtype)
                waiting.append(pool.submit(one, f"capture-{family}-{size}-{dtype}", *command, table=True))

    print("\n| model | backend | dtype | tokens | error, worst layer | transformers bf16 | ratio |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    waiting: list[Any] = []
    workers = args.workers or (1 if args.quick else 6)
    with ThreadPoolExecutor(workers) as pool:
        references = [pool.submit(case, *c) for c in cases]
        for job in references:
            job.result()
        for job in waiting:
            job.result()


def limit(args: argparse.Namespace, part: str) -> float:
    return 600 if args.quick else args.limit or LIMITS_S[part]


def tail(log: Path, count: int = 25) -> None:
    """Prints a log's error, where it has one, and its last lines."""
    if log.is_file():
        print(f"\nend of {log.name}:\n```\n{excerpt(read_end(log), count)}\n```", flush=True)


def versions() -> str:
    found = []
    for name in ("jax", "flax", "torch", "triton", "transformers"):
        version = version_of(name)
        found.append(f"no {name}" if version == UNKNOWN else f"{name} {version}")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


PARTS = {"row": row, "run": run, "hang": hang, "parity": parity, "mps": mps, "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what a CPU can do")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--side-by-side", action="store_true", help="all named parts at once: for those without a clock"
    )
    parser.add_argument("--limit", type=float, default=None, help="seconds of each part, in place of its own limit")
    parser.add_argument("--out", type=Path, default=None, help="logs and models; default: a new temporary folder")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of the parity part")
    parser.add_argument("--sizes", default="tiny,full", help="of the parity part")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the parity part; there is fp8, too")
    parser.add_argument("--workers", type=int, default=0, help="parity processes at a time; default 1 quick, else 6")
    parser.add_argument("--bridge-python", default=sys.executable, help="of the environment with torch and SGLang")
    parser.add_argument("--bridge-python-pinned", default=None, help="the same with the transformers that SGLang pins")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="bridge-benchmark-"))
    out.mkdir(parents=True, exist_ok=True)
    gpu: Any = None
    if not args.quick:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{time.strftime('%Y-%m-%d')}, {versions()}, GPU: {gpu or 'none'}\n", flush=True)

    def part(name: str) -> None:
        print(f"### {name}", flush=True)
        try:
            PARTS[name](out, args)
        except Exception as error:  # the other parts go on
            print(f"**{name} failed**: {type(error).__name__}: {error}", flush=True)

    names = args.parts.split(",")
    with ThreadPoolExecutor(len(names) if args.side_by_side else 1) as pool:
        list(pool.map(part, names))


if __name__ == "__main__":
    main()

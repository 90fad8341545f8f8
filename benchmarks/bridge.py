"""The bridge on a GPU, measured: `python -m benchmarks.bridge [--quick] [--parts parity,row,run] [--out DIR]`.

    parity  features of random Qwen3.5, Qwen3-VL, Qwen2.5-VL in SGLang against transformers (`bridge_parity`)
    row     hand-over of a row, capture, step, both together on one GPU (`bridge_row`)
    run     200 training steps on the embedded pictures with the SGLang target: loss, memory

Prints Markdown, for RESULTS.md. A part that fails says so, with the end of its log, and the others go on. `--quick`
does what a CPU can. Every part is a process of its own with a time limit; logs stay in DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bridge_row import path_with_repository

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("qwen3_5", "qwen3_vl", "qwen2_5_vl")
LIMIT_S = 240


def call(out: Path, name: str, python: str, *args: str, limit_s: float = LIMIT_S) -> str | None:
    """Runs `PYTHON -m ARGS`; its last line of output, or None where it failed (and the end of its log is printed)."""
    log = out / f"{name}.log"
    environment = os.environ | {"PYTHONPATH": path_with_repository(), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [python, "-m", *args], env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code = "time limit"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print(f"<!-- {name}: {time.monotonic() - start:.0f} s, exit code {code} -->", flush=True)
    if code != 0:
        print(
            f"\n**{name} failed** ({code}):\n```\n" + "\n".join(line[:400] for line in lines[-25:]) + "\n```",
            flush=True,
        )
        return None
    return lines[-1] if lines else ""


def parity(out: Path, args: argparse.Namespace) -> None:
    python, workers = args.bridge_python, args.workers or (1 if args.quick else 6)
    sizes = ("tiny",) if args.quick else ("tiny", "full")
    cases = [(family, size) for size in sizes for family in args.families.split(",")]

    def reference(case: tuple[str, str]) -> None:
        call(out, f"reference-{'-'.join(case)}", python, "benchmarks.bridge_parity", "reference", *case, str(out))

    def capture(job: tuple[str, str, str]) -> str | None:
        family, size, dtype = job
        name = f"capture-{family}-{size}-{dtype}"
        return call(out, name, python, "benchmarks.bridge_parity", "capture", family, size, str(out), dtype)

    jobs = [(*case, dtype) for dtype in args.dtypes.split(",") for case in cases]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(reference, cases))
        lines = list(pool.map(capture, jobs))
    print("\n| model | backend | dtype | tokens | error, worst layer | transformers bf16 | ratio |")
    print("|---|---|---|---|---|---|---|")
    for line in filter(None, lines):
        r = json.loads(line)
        for kind in ("text", "image"):
            worst, own = max(r[kind]["sglang"]), max(r[kind]["transformers bf16"])
            how = f"{r['backend']}, {r['setter']}, {r['capture']}"
            figures = f"{worst:.2e} | {own:.2e} | {r[kind]['ratio']:.3g}"
            print(f"| {r['family']} {r['size']} | {how} | {r['dtype']} | {kind} | {figures} |")
    print(flush=True)


def row(out: Path, args: argparse.Namespace) -> None:
    python, size = args.bridge_python, ("--quick",) if args.quick else ()
    call(out, "row-write", python, "benchmarks.bridge_row", str(out / "row"), "--write", *size)
    line = call(out, "row", sys.executable, "benchmarks.bridge_row", str(out / "row"), python, *size)
    if line is None:
        tail(out / "row" / "bridge.log")
        return
    print("\n```")
    for name, value in json.loads(line).items():
        print(f"{name:24} {json.dumps(value)}")
    print("```", flush=True)


def run(out: Path, args: argparse.Namespace) -> None:
    """200 steps of the embedded job; GPU memory in use sampled beside it."""
    steps, python = 4 if args.quick else 200, args.bridge_python
    command = ["jaxdraft.train", "--config", "tiny_qwen35vl.py", "--output-dir", str(out), "--name", "run"]
    command += ["--max-steps", str(steps), "--epochs", "200", "--eval-interval", "100", "--save-interval", "100"]
    command += ["--bridge.python", python, "--num-decode", "0"]
    command += ["--data.cache-dir", str(out / "cache"), "--bridge.restarts", "1"]
    if args.quick:
        command += ["--target.backend", "huggingface"]
    else:
        command += ["--bridge.transport", "cuda_ipc", "--target.backend", "sglang", "--target.dtype", "bfloat16"]
        command += [
            "--compute-dtype",
            "bfloat16",
            "--trainer.memory-fraction",
            "0.4",
            "--bridge.memory-fraction",
            "0.3",
        ]
    samples: list[tuple[int, int]] = []  # (step, MiB in use on the GPU)
    metrics = out / "run" / "metrics.jsonl"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(call, out, "run-train", sys.executable, *command)
        while not done.done():
            time.sleep(0.5)
            step = last_step(metrics)
            if step and (used := gpu_memory()) is not None:
                samples.append((step, used))
    if done.result() is None:
        tail(out / "run" / "bridge.log")
    print("\n```")
    text = (out / "run-train.log").read_text()
    print(text[text.find("GPU memory") : text.find("plan  ")] if "GPU memory" in text else "")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    if losses:
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        finite = all(map(math.isfinite, losses))
        print(f"{len(losses)} steps, loss of the first tenth {first:.3f}, of the last {last:.3f}; all finite: {finite}")
        for line in lines[:1] + lines[-1:]:
            print({k: v for k, v in line.items() if isinstance(v, (int, float, str))})
    if samples:
        some = samples[:: max(1, len(samples) // 12)]
        print(f"(step, MiB in use on the GPU): {some}")
    print("```", flush=True)


def last_step(metrics: Path) -> int:
    try:
        return json.loads(metrics.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, KeyError, ValueError):
        return 0


def gpu_memory() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def tail(log: Path) -> None:
    if log.is_file():
        lines = log.read_text(errors="replace").splitlines()
        print(f"\nend of {log.name}:\n```\n" + "\n".join(line[:400] for line in lines[-30:]) + "\n```", flush=True)


def versions() -> str:
    from importlib import metadata

    found = []
    for name in ("jax", "flax", "torch", "triton", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what a CPU can do")
    parser.add_argument("--parts", default="row,run,parity")
    parser.add_argument("--out", type=Path, default=None, help="logs and models; default: a new temporary folder")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of the parity part")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the parity part")
    parser.add_argument("--workers", type=int, default=0, help="parity processes at a time; default 1 quick, else 6")
    parser.add_argument("--bridge-python", default=sys.executable, help="of the environment with torch and SGLang")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="bridge-benchmark-"))
    out.mkdir(parents=True, exist_ok=True)
    gpu: Any = None
    if not args.quick:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{time.strftime('%Y-%m-%d')}, {versions()}, GPU: {gpu or 'none'}\n", flush=True)
    parts: dict[str, Any] = {"parity": parity, "row": row, "run": run}
    for part in args.parts.split(","):
        print(f"### {part}", flush=True)
        try:
            parts[part](out, args)
        except Exception as error:  # the other parts go on
            print(f"**{part} failed**: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()

"""Time of a training step, ours beside its peers': `python -m benchmarks.step` on a GPU, `--quick` anywhere.

First it compares: the attention and the loss with float32 references, loss and gradients with the peers'. Then it
times forward + backward (and ours with the optimizer) of one packed row: every step waited for, median. Useful work
counts each matrix product once forward and its backward, attention at its average context of S/2, the frozen head's
input gradient only.

A GPU under load lowers its clock to stay within its power: so the ceiling is measured for seconds, like the steps.
Programs compile side by side; `--start` measures compilation alone, in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.step_shapes import (  # sets XLA's flags: before jax
    SCALING,
    SHAPES,
    TINY_SCALING,
    Shape,
    make_inputs,
)

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from benchmarks.step_checks import check_kernels
from benchmarks.step_jobs import Job, floor, ours, training_step, with_optimizer
from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.losses import LossConfig
from jaxdraft.ops import block_attention

PEERS = {
    "specforge": ("benchmarks.step_specforge", "SpecForge"),
    "speculators": ("benchmarks.step_speculators", "Speculators"),
}
"""Where the step of an installed package is."""


def time_each(function: Callable, repeats: int) -> list[float]:
    """Milliseconds of each call, waited for."""
    for _ in range(2):
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - started))
    return times


def time_job(job: Job, repeats: int, *, profile: int = 0) -> list[float]:
    step = job.start(job.built.result()[0])
    times = time_each(step, repeats)
    if profile:
        print_kernels(step, profile)
    return times


def measure_ceiling(size: int, seconds: float) -> float:
    """TFLOP/s of a bfloat16 product size³ on random data, sustained for `seconds`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        jax.block_until_ready([product(a, b) for _ in range(20)])
        count += 20
    return 2 * size**3 * count / elapsed / 1e12


def print_kernels(step, top: int) -> None:
    """The kernels of a step by their time on the GPU, from a trace of three steps."""
    totals, counts = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready([step() for _ in range(3)][-1])
        for file in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    for event in line.events if "Stream" in line.name else ():
                        totals[event.name] += event.duration_ns / 3e6
                        counts[event.name] += 1
    print(f"kernels of a step: {sum(totals.values()):.1f} ms")
    for name, milliseconds in totals.most_common(top):
        print(f"  {milliseconds:7.3f} ms in {counts[name] / 3:4.1f} x {name[:80]}")


def installed_peers() -> list[str]:
    """Prints which are missing."""
    missing = [package for package in PEERS if importlib.util.find_spec(package) is None]
    for package in missing:
        print(f"{package} is not installed and left out: pip install --no-deps -r tests/peers.txt", flush=True)
    return [package for package in PEERS if package not in missing]


def open_peers(job: Job, packages: list[str]) -> list:
    """The steps of these peers, after their losses and gradients have been compared with ours."""
    torchvision_ops.ensure()  # before transformers
    import torch

    from benchmarks.step_peers import compare

    *inputs, valid = make_inputs(job.shape)
    draft, peers = job.shape.draft(), []
    for module, name in (PEERS[package] for package in packages):
        peer = getattr(importlib.import_module(module), name)(draft, LossConfig(), *inputs, dtype=torch.bfloat16)
        compare(job.label, peer, peer.loss_and_gradients(), job.built.result()[0](*inputs, valid), draft)
        peers.append(peer)
    return peers


class Table:
    """Rows, printed as they are measured and once more as a table."""

    def __init__(self):
        self.lines = []

    def add(self, label, system, shape: Shape, times, peak, seconds, ceiling) -> None:
        median = np.median(times)
        rate = shape.useful_flop() / median / 1e9
        self.lines.append(
            f"| {label} | {system} | {median:.1f} | {min(times):.1f} | {rate:.0f} | {rate / ceiling:.0%} "
            f"| {peak:.1f} | {seconds:.0f} |"
        )
        print(self.lines[-1], flush=True)

    def print(self) -> None:
        print("\n| shape | system | ms (median) | fastest | useful TFLOP/s | of ceiling | peak GB | compiled, s |")
        print("|---|---|---|---|---|---|---|---|", *self.lines, sep="\n")


def start_once(shape: Shape) -> None:
    """Seconds of a start of this process until its first training step is done, by parts."""
    process = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + process_start()
    marks = [("interpreter and imports", time.time())]
    _, frozen, batch, *_ = jax.block_until_ready(make_inputs(shape))
    step, init = training_step(shape, "auto")
    state = jax.block_until_ready(jax.jit(init)(jax.random.key(1)))
    marks.append(("data and weights", time.time()))
    lowered = step.lower(frozen, state, batch, jax.random.key(1))
    marks.append(("trace and lower", time.time()))
    compiled = lowered.compile()
    marks.append(("compile", time.time()))
    jax.block_until_ready(compiled(frozen, state, batch, jax.random.key(1)))
    marks.append(("first step", time.time()))
    parts, before = [], process
    for name, at in marks:
        parts.append(f"{name} {at - before:.1f}")
        before = at
    print(f"{before - process:.1f} s to the first step: {', '.join(parts)}", flush=True)


def process_start() -> float:
    """When this process began, in seconds since boot."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_starts(name: str) -> None:
    """A cold start and a second one, each a process, with a compilation cache of their own."""
    with tempfile.TemporaryDirectory() as directory:
        for kind in ("cold", "second, from the compilation cache"):
            command = [sys.executable, "-m", "benchmarks.step", "--start-once", name]
            env = os.environ | {"JAX_COMPILATION_CACHE_DIR": directory}
            print(f"{name}, start, {kind}:", end=" ", flush=True)
            subprocess.run(command, env=env, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a few steps: does it work?")
    parser.add_argument("--shapes", nargs="+", default=["4b", "8b"], choices=SHAPES)
    parser.add_argument("--attention", nargs="+", default=["auto"], help="implementations of the block attention")
    parser.add_argument("--head-chunk-tokens", nargs="+", type=int, default=[], help="also these chunks of the head")
    parser.add_argument("--float8-head", action="store_true", help="also with the head's products in 8 bits")
    parser.add_argument("--floor", action="store_true", help="also the step's products, and its attention, alone")
    parser.add_argument(
        "--peers", nargs="*", metavar="SHAPE", help="also SpecForge and speculators, at these shapes (all)"
    )
    parser.add_argument(
        "--scaling", nargs="*", metavar="FIELD", help="also other numbers of anchors, rows, tokens, vocab (all four)"
    )
    parser.add_argument(
        "--no-optimizer", action="store_true", help="leave out the first shape's step with the optimizer"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--start", action="store_true", help="only: a cold start and a second one, in processes")
    parser.add_argument("--start-once", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_once:
        return start_once(SHAPES[args.start_once])
    if args.quick:
        args.shapes, args.repeats = ["tiny"], 3
    if args.start:
        return measure_starts(args.shapes[0])
    packages = [] if args.peers is None else installed_peers()

    device = jax.devices()[0].device_kind
    choice = block_attention.attention_choice(jnp.bfloat16, SHAPES[args.shapes[0]].head_dim)
    print(f"{device}, jax {jax.__version__}, Python {platform.python_version()}; attention auto = {choice}", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs, peers = [], {}
        for name in args.shapes:
            shape = SHAPES[name]
            jobs += [ours(pool, name, shape, attention=attention) for attention in args.attention]
            jobs += [ours(pool, name, shape, head_chunk_tokens=n) for n in args.head_chunk_tokens]
            if args.floor:
                jobs += [floor(pool, name, shape, attention=attention) for attention in (False, True)]
            if args.float8_head:
                jobs.append(ours(pool, name, shape, head_dtype="float8_e4m3fn"))
            if shape is SHAPES[args.shapes[0]] and not args.no_optimizer:
                jobs.append(with_optimizer(pool, name, shape, args.attention[0]))
            for change in [] if args.scaling is None else TINY_SCALING if args.quick else SCALING:
                if args.scaling and not change.keys() & set(args.scaling):
                    continue
                label = f"{name} " + " ".join(f"{k}={v}" for k, v in change.items())
                jobs.append(ours(pool, label, dataclasses.replace(shape, **change), attention=args.attention[0]))
        check_kernels(quick=args.quick)
        for name in args.shapes if args.peers == [] else args.peers or ():
            peers[name] = open_peers(next(job for job in jobs if job.label == name), packages)

    table, size = Table(), 256 if args.quick else 8192
    time.sleep(0 if args.quick else 2)
    burst = measure_ceiling(size, 0.05)
    for name in args.shapes:
        shape, ceiling = SHAPES[name], measure_ceiling(size, 0.1 if args.quick else 2.0)
        tflop = shape.useful_flop() / 1e12
        print(f"{name}: {tflop:.1f} useful TFLOP; ceiling {ceiling:.0f} TFLOP/s, {burst:.0f} on a cold GPU", flush=True)
        for job in jobs:
            if job.label.split()[0] == name:
                times = time_job(job, args.repeats, profile=args.profile if job is jobs[0] else 0)
                table.add(job.label, job.system, job.shape, times, job.peak(), job.built.result()[1], ceiling)
        for peer in peers.pop(name, ()):
            for variant in peer.variants:
                times, peak, seconds = peer.measure(variant, lambda f: time_each(f, args.repeats))
                system = f"{peer.name}, {peer.attention}, {variant}"
                table.add(name, system, shape, times, peak, seconds, ceiling)
            peer.close()
    table.print()


if __name__ == "__main__":
    main()

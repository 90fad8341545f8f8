"""The training step and its checkpoints on meshes of several GPUs: parts of `benchmarks.several_gpus`.

Every mesh trains on the same N rows, and accumulates where it has fewer groups of devices, so losses must agree.
"Efficiency" is one GPU's time for a row of its own over the mesh's (weak scaling); for `tensor`, whose GPUs share the
row, that time over N times the mesh's.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.step import SHAPES, Shape, make_inputs, time_each
from jaxdraft.checkpoint import Checkpoints, abstract_like
from jaxdraft.losses import LossConfig
from jaxdraft.objective import Batch, Frozen, batch_shardings
from jaxdraft.optim import OptimConfig
from jaxdraft.sharding import MESH_AXES, frozen_sharding, make_mesh, num_row_groups
from jaxdraft.train_step import StepConfig, TrainState, init_state, make_train_step, state_shardings

STEPS = 20
TOLERANCE = 2e-2  # of a loss, between two orders of summation in bfloat16; absolute where it is below 1
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(-start)?\((.*?)\)(?:,|$)", re.M)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def say(what: str, measured: Any) -> None:
    print(f"| {what} | {measured} |", flush=True)


class OnMesh:
    """The compiled step on one mesh, and the rows of one step as its micro-batches."""

    def __init__(self, shape: Shape, sizes: tuple[int, int, int], rows: int, *, float32_gradients: bool = False):
        """`rows`: of an optimizer step; those that do not fit the mesh's groups are accumulated."""
        self.mesh = make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)), devices=jax.devices()[: int(np.prod(sizes))])
        groups = num_row_groups(self.mesh)
        self.draft, self.optim, self.key = shape.draft(), OptimConfig(), jax.random.key(1)
        self.options = StepConfig(
            num_anchors=shape.anchors,
            total_steps=1000,
            accumulation=rows // groups,
            float32_gradients=float32_gradients,
        )
        _, frozen, batch, *_ = make_inputs(dataclasses.replace(shape, rows=rows))
        head = jax.device_put(frozen.head, frozen_sharding(self.mesh))
        self.frozen = Frozen(embedding=head, head=head)
        micro = [jax.tree.map(lambda x, i=i: x[i : i + groups], batch) for i in range(0, rows, groups)]
        self.batches: list[Batch] = [jax.device_put(one, batch_shardings(self.mesh)) for one in micro]
        self.place = state_shardings(self.draft, self.optim, self.options, self.mesh)
        step = make_train_step(self.draft, LossConfig(), self.optim, self.options, self.frozen, mesh=self.mesh)
        abstract = jax.eval_shape(self._init)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, self.place)
        self.compiled = step.func.lower(self.frozen, placed, self.batches[0], self.key).compile()

    def _init(self) -> TrainState:
        return init_state(self.draft, self.optim, self.options, self.key)

    def new_state(self) -> TrainState:
        return jax.jit(self._init, out_shardings=self.place)()

    def losses(self, state: TrainState, steps: int) -> tuple[list[float], TrainState]:
        """Loss of each of these steps; `state` is donated."""
        found = []
        for _ in range(steps):
            for batch in self.batches:
                state, metrics = self.compiled(self.frozen, state, batch, self.key)
            found.append(float(metrics["loss"]))
        return found, state

    def runner(self) -> Callable[[], Any]:
        """One micro-batch a call."""
        state = self.new_state()

        def one() -> Any:
            nonlocal state
            state, metrics = self.compiled(self.frozen, state, self.batches[0], self.key)
            return metrics

        return one

    @property
    def peak_gb(self) -> float:
        memory = self.compiled.memory_analysis()
        sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (sizes + memory.temp_size_in_bytes) / 1e9


def difference(losses: list[float], expected: list[float]) -> float:
    """The largest, relative to a loss that is above 1."""
    return max(abs(a - b) / max(b, 1.0) for a, b in zip(losses, expected, strict=True))


def collectives(hlo: str) -> str:
    """What a compiled step sends, by kind and type: number and bytes of a device's results."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for shapes, kind, start, operands in COLLECTIVE.findall(hlo):
        arrays = [array for array in ARRAY.findall(shapes) if array != ("u32", "")]
        if start and len(arrays) == 2 * operands.count("%"):  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        for dtype, dims in arrays:
            total = totals[f"{kind} {dtype}"]
            total[0] += 1
            total[1] += BYTES.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n]))
    return ", ".join(f"{n} x {name} {size / 1e6:.2f} MB" for name, (n, size) in sorted(totals.items())) or "none"


def traced(step: Callable[[], Any], steps: int = 3) -> list[list[tuple[str, float, float]]]:
    """(name, start, end) in seconds of everything on each GPU's streams during these steps; none on a CPU."""
    planes = []
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(steps):
                jax.block_until_ready(step())
        for file in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "GPU" in plane.name:
                    lines = [line for line in plane.lines if "Stream" in line.name]
                    events = [event for line in lines for event in line.events]
                    planes.append([(e.name, e.start_ns / 1e9, (e.start_ns + e.duration_ns) / 1e9) for e in events])
    return [plane for plane in planes if plane]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def share_in_collectives(planes: list[list[tuple[str, float, float]]]) -> str:
    """Of a GPU's time, the largest: in NCCL's kernels, and in those with no other kernel beside them."""
    if not planes:
        return "no GPU: not measured"
    shares = []
    for events in planes:
        every = [(start, end) for _, start, end in events]
        sending = [(start, end) for name, start, end in events if "nccl" in name.lower()]
        other = [(start, end) for name, start, end in events if "nccl" not in name.lower()]
        length = max(end for _, end in every) - min(start for start, _ in every)
        shares.append((covered(sending) / length, (covered(every) - covered(other)) / length))
    every, bare = (max(column) for column in zip(*shares, strict=True))
    return f"{every:.1%} of the time, {bare:.1%} with nothing beside"


def copies_between(planes: list[list[tuple[str, float, float]]]) -> str:
    """Copies from GPU to GPU that are no collectives."""
    if not planes:
        return "no GPU: not measured"
    kinds = collections.Counter(name for events in planes for name, _, _ in events if "p2p" in name.lower())
    return ", ".join(f"{count} x {name}" for name, count in kinds.items()) or "none"


def meshes(shape: Shape, devices: int) -> dict[str, tuple[int, int, int]]:
    tensor = min(devices, shape.kv_heads)
    return {
        "one GPU": (1, 1, 1),
        f"data={devices}": (devices, 1, 1),
        f"fsdp={devices}": (1, devices, 1),
        f"tensor={tensor}" if tensor == devices else f"data={devices // tensor}, tensor={tensor}": (
            devices // tensor,
            1,
            tensor,
        ),
    }


def steps(shape: Shape, args: argparse.Namespace) -> None:
    devices, repeats = args.devices, 3 if args.quick else 20
    chosen = {
        name: sizes
        for name, sizes in meshes(shape, devices).items()
        if name == "one GPU" or any(x in name for x in args.meshes.split(","))
    }
    say("machine", f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    say("useful TFLOP of a row", f"{shape.useful_flop() / 1e12:.2f}")
    single_losses, single_ms = [], 0.0
    for name, sizes in chosen.items():
        on = OnMesh(shape, sizes, devices, float32_gradients=args.float32_gradients)
        losses, _ = on.losses(on.new_state(), STEPS)
        single_losses = single_losses or losses
        worst = difference(losses, single_losses)
        say(f"{name}: losses 1 and {STEPS}", f"{losses[0]:.4f}, {losses[-1]:.4f}; off one GPU's by at most {worst:.1e}")
        assert worst < TOLERANCE, (losses, single_losses)
        groups = num_row_groups(on.mesh)
        if on.options.accumulation > 1:  # a row of a group each, for the clock
            del on
            on = OnMesh(shape, sizes, groups, float32_gradients=args.float32_gradients)
        one = on.runner()
        ms = float(np.median(time_each(one, repeats)))
        single_ms = single_ms or ms
        rate = shape.useful_flop() * groups / on.mesh.size / ms / 1e9
        say(f"{name}: a step", f"{ms:.1f} ms for {groups} rows, {rate:.3g} useful TFLOP/s a GPU, {on.peak_gb:.1f} GB")
        say(f"{name}: efficiency", f"{single_ms * groups / on.mesh.size / ms:.1%}")
        if on.mesh.size > 1:
            say(f"{name}: sends", collectives(on.compiled.as_text()))
            planes = traced(one)
            say(f"{name}: in collectives", share_in_collectives(planes))
            say(f"{name}: other copies between GPUs", copies_between(planes))
        del one, on


def checkpoint(shape: Shape, args: argparse.Namespace) -> None:
    devices = args.devices
    saved_on = OnMesh(shape, (1, devices, 1), devices)
    _, state = saved_on.losses(saved_on.new_state(), 3)
    with tempfile.TemporaryDirectory(dir=args.out) as directory, Checkpoints(Path(directory), keep=1) as checkpoints:
        without = state.saved()
        checkpoints.save(3, without, {})
        leaves = jax.device_get(jax.tree.leaves(without))
        expected, _ = saved_on.losses(state, 5)
        checkpoints.wait()
        del state, without
        say("saved on", dict(saved_on.mesh.shape))
        everything = min(jax.device_count(), 2 * devices)
        for sizes in dict.fromkeys([(1, 1, 1), (devices, 1, 1), (1, everything, 1)]):
            groups = sizes[0] * sizes[1]
            if devices % groups and groups > devices:
                rows, on = groups, OnMesh(shape, sizes, groups)  # more groups than rows: other rows, the bits alone
            else:
                rows, on = devices, OnMesh(shape, sizes, devices)
            new = on.new_state()
            restored = checkpoints.restore(3, abstract_like(new.saved()))
            same = all(
                np.array_equal(a, b) for a, b in zip(jax.device_get(jax.tree.leaves(restored)), leaves, strict=True)
            )
            line = "the same bits" if same else "OTHER BITS"
            assert same
            if rows == devices:
                losses, _ = on.losses(new.resumed(restored, on.options), 5)
                worst = difference(losses, expected)
                line += f"; next 5 losses off by at most {worst:.1e}"
                assert worst < TOLERANCE
            say(f"restored on {dict(on.mesh.shape)}", line)
            del on, new, restored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("steps", "checkpoint"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--meshes", default="data,fsdp,tensor")
    parser.add_argument("--float32-gradients", action="store_true")
    args = parser.parse_args()
    shape = dataclasses.replace(SHAPES["tiny"], vocab=512, layers=1) if args.quick else SHAPES["4b"]
    {"steps": steps, "checkpoint": checkpoint}[args.part](shape, args)


if __name__ == "__main__":
    main()

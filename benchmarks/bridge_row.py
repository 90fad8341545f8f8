"""A bridge and a trainer on one GPU: what a row costs, alone and together, and how it changes hands.

    python -m benchmarks.bridge_row DIR BRIDGE_PYTHON [--quick] [--phases A,B] [--anchors N]

Target and data are `bridge_data`'s: Qwen3.5-4B's shape, pictures and text. The draft is the published 5-layer one, and
the step is `jaxdraft.train_step` with its optimizer. In one process and its bridge, in this order, a line at a time:

    hand-over     from the end of the target's extend in the bridge to arrays that JAX can use (one clock for both)
    capture       the bridge alone, always asked for the next rows
    step          the training step alone, on a copy of one row; then both together, as `jaxdraft.train` runs them
    accumulated   the same with one optimizer update in four rows
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bridge_trace import of_trace
from benchmarks.bridge_worker import PROFILED_FILL, Times, times_of

PHASES = ("hand-over", "capture", "step", "accumulated")
ACCUMULATION = 4
ROWS = {"full": 30, "quick": 4}  # measured in each phase
WARM_ROWS = 12
WARM_CAPTURES = 4

# --- the measurements -------------------------------------------------------------------------------------------------


def make_config(root: Path, size: str, anchors: int | None) -> Any:
    from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig, TrainerConfig

    full = size == "full"
    return Config(
        name="row",
        output_dir=str(root / "runs"),
        target=TargetConfig(path=str(root / "target"), backend="sglang" if full else "huggingface"),
        data=DataConfig(
            train_path=str(root / "train.jsonl"),
            eval_fraction=0,
            row_tokens=4096 if full else 1024,
            max_pixels=512 * 512 if full else None,
            cache_dir=str(root / "cache"),
        ),
        draft=DraftOptions(
            num_layers=5 if full else 1,
            block_size=16,
            **({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "intermediate_size": 9728} if full else {}),
        ),
        bridge=BridgeConfig(
            transport="cuda_ipc" if full else "shared_memory",
            sglang_args={"load_format": "dummy"} if full else {},
            memory_fraction=0.25 if full else None,
        ),
        trainer=TrainerConfig(memory_fraction=0.5 if full else None),
        epochs=200,
        max_steps=1000,
        anchors_per_row=anchors,
    )


def say(name: str, value: Any) -> None:
    """One line of the table, at once."""
    print(f"| {name} | {value} |", flush=True)


def first_steps(config: Any, draft: Any, mesh: Any, accumulations: list[int]) -> dict[int, tuple[Any, Any]]:
    """The jitted step and a state for it, by accumulation; compiled and run on a row of ones."""
    import jax
    import jax.numpy as jnp

    from jaxdraft.objective import Batch, Frozen, batch_shardings
    from jaxdraft.sharding import frozen_sharding
    from jaxdraft.train_step import StepConfig, init_state, make_train_step, state_shardings

    tokens, width = config.data.row_tokens, draft.hidden_size * len(draft.target_layer_ids)
    batch = Batch(
        tokens=jnp.zeros((1, tokens), jnp.int32),
        segment_start=jnp.zeros((1, tokens), jnp.int32),
        loss_mask=jnp.ones((1, tokens), jnp.uint8),
        features=jnp.ones((1, tokens, width), jnp.bfloat16),
        num_tokens=jnp.full((1,), tokens, jnp.int32),
        row_ids=jnp.zeros((1,), jnp.int32),
    )
    batch, key = jax.device_put(batch, batch_shardings(mesh)), jax.random.key(0)
    matrix = jax.device_put(jnp.ones((draft.vocab_size, draft.hidden_size), jnp.bfloat16), frozen_sharding(mesh))
    steps = {}
    for accumulation in accumulations:
        options = StepConfig(
            num_anchors=config.num_anchors,
            total_steps=config.max_steps,
            anchor_rule=config.anchor_rule,
            accumulation=accumulation,
            compute_dtype=config.compute_dtype,
            keep_narrow=True,
        )
        start = time.monotonic()
        init = functools.partial(init_state, draft, config.optim, options)
        state = jax.jit(init, out_shardings=state_shardings(draft, config.optim, options, mesh))(key)
        step = make_train_step(
            draft, config.loss, config.optim, options, Frozen(embedding=matrix, head=matrix), mesh=mesh
        )
        for _ in range(accumulation):
            state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        say(f"first step{_of(accumulation)}", f"{time.monotonic() - start:.0f} s, compilation included")
        steps[accumulation] = step.func, state
    return steps


def _of(accumulation: int) -> str:
    return "" if accumulation == 1 else f", accumulation {accumulation}"


class Run:
    """A bridge and the compiled steps; a method a phase."""

    def __init__(self, root: Path, size: str, bridge: Any, config: Any, mesh: Any, steps: Any, target: Any):
        import jax
        import numpy as np

        from jaxdraft.bridges import memory_use
        from jaxdraft.frozen import FrozenWeights
        from jaxdraft.run import make_plan

        self.root, self.rows, self.bridge, self.config, self.mesh = root, ROWS[size], bridge, config, mesh
        device = mesh.local_devices[0]
        before = (device.memory_stats() or {}).get("bytes_in_use", 0)
        self.frozen = FrozenWeights(config, target, bridge, mesh, config.compute_dtype)
        jax.block_until_ready(self.frozen())
        grown = (device.memory_stats() or {}).get("bytes_in_use", 0) - before
        say("embedding and head", f"{self.frozen.origin}; JAX's own memory grew by {grown / 2**20:.1f} MiB")
        for what, amount in memory_use(bridge, device).items():
            say(f"memory: {what}", f"{amount / 2**30:.2f} GiB")
        lengths = np.frombuffer(bridge.ready.indexes["train"].lengths, "<i4")
        self.plan = make_plan(config, lengths, np.empty(0, np.int32), 1)
        self.key = jax.random.key(0)
        self.requests = self.plan.requests(0)  # read once: no picture comes again before the epoch's end
        self.capture_s = self.batch = None
        self.steps = steps

    def warm_up(self) -> None:
        """Rows of different lengths, so that the target's kernels are there."""
        from jaxdraft.features import FeatureStream

        stream = FeatureStream(self.bridge, itertools.islice(self.requests, WARM_ROWS), self.mesh)
        for slot in stream:
            stream.release(slot.filled)

    def hand_over(self) -> None:
        """One slot is under way at a time: the trainer waits for each."""
        import jax

        from jaxdraft.features import FeatureStream

        stream = FeatureStream(self.bridge, itertools.islice(self.requests, self.rows), self.mesh)
        stream._num_slots = 1
        times, in_bridge, fills = [], [], []
        for slot in stream:
            usable, filling = time.monotonic(), times_of(slot.rows[0])
            jax.block_until_ready(slot.batch)  # as they were before: the slot's bytes are complete
            times.append(usable - filling.extended)
            in_bridge.append(filling.end - filling.extended)
            (filled,) = slot.filled
            fills.append(filled.seconds)
            producers, batch = self.bridge.slot(filled), slot.batch
            assert all(getattr(batch, n).unsafe_buffer_pointer() == p.address for n, p in producers.items())
            num_bytes = batch.features.nbytes
            time.sleep(0.01)
            stream.release(slot.filled)
        say("row", f"{self.config.data.row_tokens} tokens, {num_bytes / 1e6:.1f} MB of features")
        say("hand-over, extend's end to a batch of JAX arrays", quantiles(times[2:]))
        say("of it until the slot's bytes are complete", quantiles(in_bridge[2:]))
        say("pointers equal the slot's", f"all of {self.rows} rows")
        say("a fill that nothing was prepared for", quantiles(fills))

    def capture(self) -> None:
        """The bridge is always asked for the next rows."""

        fills: list[Times] = []

        def rows(count: int) -> tuple[int, int]:
            samples = tokens = 0
            for _ in range(count):
                slot = next(self.stream)
                samples, tokens = samples + len(slot.rows[0].samples), tokens + slot.rows[0].num_tokens
                fills.append(times_of(slot.rows[0]))
                self.stream.release(slot.filled)
            return samples, tokens

        rows(WARM_CAPTURES)
        fills.clear()
        start = time.monotonic()
        samples, tokens = rows(self.rows)
        seconds = time.monotonic() - start
        self.capture_s = seconds / self.rows
        say("capture alone", f"{1000 * self.capture_s:.1f} ms a row")
        say("capture alone, throughput", f"{tokens / seconds:,.0f} tokens/s, {samples / seconds:.2f} samples/s")
        say("a prepared fill: waiting for its samples", quantiles([fill.launching - fill.begin for fill in fills]))
        say("a prepared fill: launching the extend", quantiles([fill.launched - fill.launching for fill in fills]))
        say("a prepared fill: from there to its end", quantiles([fill.end - fill.launched for fill in fills]))
        for name, value in of_trace(self.root / "fill_trace.json").items():
            say(f"one prepared fill: {name}", value)

    def one_batch(self) -> Any:
        """A copy of one row. Afterwards the bridge is idle: it has filled what it was asked for."""
        import jax
        import jax.numpy as jnp

        if self.batch is None:
            slot = next(self.stream)
            self.batch = jax.block_until_ready(jax.tree.map(jnp.array, slot.batch))
            self.stream.release(slot.filled)
            time.sleep(5 * (self.capture_s or 1.0) + 0.5)
        return self.batch

    def step(self, accumulation: int = 1) -> None:
        """Step alone, then both together; the parts' sum is of this very run."""
        import jax

        batch, (compiled, state) = self.one_batch(), self.steps.pop(accumulation)
        step = functools.partial(self._step, compiled)
        name = _of(accumulation)
        for _ in range(2 * accumulation):
            state, metrics = step(state, batch, self.key)
        jax.block_until_ready((state, metrics))
        count = self.rows // accumulation * accumulation
        start = time.monotonic()
        for _ in range(count):
            state, metrics = step(state, batch, self.key)
        jax.block_until_ready((state, metrics))
        step_s = (time.monotonic() - start) / count
        say(f"step alone, with optimizer{name}", f"{1000 * step_s:.1f} ms a row")
        self.together(step, state, step_s, name)

    def _step(self, compiled: Any, state: Any, batch: Any, key: Any) -> Any:
        return compiled(self.frozen(), state, batch, key)

    def together(self, step: Callable[..., Any], state: Any, step_s: float, name: str) -> None:
        """As `jaxdraft.train` does it: a slot goes back when its step is done, a step late."""
        import jax

        def rows(count: int) -> Iterator[Any]:
            nonlocal state
            previous = None
            for _ in range(count):
                slot = next(self.stream)
                state, metrics = step(state, slot.batch, self.key)
                if previous is not None:
                    jax.block_until_ready(previous[1])
                    self.stream.release(previous[0].filled)
                previous = slot, metrics
                yield slot.rows[0]
            jax.block_until_ready(previous[1])
            self.stream.release(previous[0].filled)

        list(rows(4))
        waited, start = self.stream.seconds_waiting, time.monotonic()
        done = list(rows(self.rows // 4 * 4))
        seconds = time.monotonic() - start
        waited = self.stream.seconds_waiting - waited
        samples, tokens = sum(len(row.samples) for row in done), sum(row.num_tokens for row in done)
        a_row = seconds / len(done)
        say(f"together{name}", f"{1000 * a_row:.1f} ms a row, of it {1000 * waited / len(done):.1f} waiting for a slot")
        say(f"end to end{name}", f"{samples / seconds:.2f} samples/s, {tokens / seconds:,.0f} tokens/s, "
            f"{tokens / max(1, samples):.0f} tokens a sample, {self.config.num_anchors} anchors a row")  # fmt: skip
        if self.capture_s:
            say(f"together / (capture alone + step alone){name}", f"{a_row / (self.capture_s + step_s):.3f}")


def main(
    root: Path, size: str, python: str, phases: list[str], anchors: int | None, rows: int | None, wait_for: Path | None
) -> None:
    from jaxdraft import runtime
    from jaxdraft.gpu_memory import claim_gpu_memory, limit_gpu_memory

    config = make_config(root, size, anchors)
    limit_gpu_memory(config.trainer.memory_fraction)
    runtime.configure()
    import jax

    from feature_bridge.client import connect
    from jaxdraft.bridges import make_bridge_spec
    from jaxdraft.features import FeatureStream
    from jaxdraft.sharding import make_mesh
    from jaxdraft.target import make_draft_config, open_target

    device = jax.local_devices()[0]
    claim_gpu_memory([device])
    target = open_target(config.target)
    draft = make_draft_config(config.draft, target)
    mesh = make_mesh(data=1, devices=[device])
    accumulations = [n for n, phase in ((1, "step"), (ACCUMULATION, "accumulated")) if phase in phases]
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        compiled = pool.submit(first_steps, config, draft, mesh, accumulations)  # while the bridge starts
        started = time.monotonic()
        before_capture = WARM_ROWS + ((rows or ROWS[size]) if "hand-over" in phases else 0)
        bridge = connect(
            make_bridge_spec(config, draft.target_layer_ids),
            log_path=root / "bridge.log",
            python=python,
            worker="benchmarks.bridge_worker:TimedWorker",
            env={"PYTHONPATH": path_with_repository(), PROFILED_FILL: str(before_capture + WARM_CAPTURES - 1)},
        )
        stack.enter_context(bridge)
        say("machine", f"{device.device_kind}; {bridge.ready.target.backend}; jax {jax.__version__}")
        say("bridge ready after", f"{time.monotonic() - started:.0f} s")
        run = Run(root, size, bridge, config, mesh, compiled.result(), target)
        run.rows = rows or run.rows
        run.warm_up()
        while wait_for is not None and not wait_for.exists():
            time.sleep(0.1)
        if "hand-over" in phases:
            run.hand_over()
        run.stream = FeatureStream(bridge, run.requests, mesh)
        if "capture" in phases:
            run.capture()
        if "step" in phases:
            run.step()
        if "accumulated" in phases:
            run.step(ACCUMULATION)


def quantiles(seconds: list[float]) -> str:
    ordered = sorted(1000 * s for s in seconds)
    return (
        f"median {ordered[len(ordered) // 2]:.2f} ms, p90 {ordered[int(0.9 * len(ordered))]:.2f}, max {ordered[-1]:.2f}"
    )


def path_with_repository() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge_row", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("python", nargs="?", default=sys.executable)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--anchors", type=int, default=None, help="of a row")
    parser.add_argument("--rows", type=int, default=None, help="measured in each phase")
    parser.add_argument("--wait-for", type=Path, default=None, help="nothing is timed before this file is there")
    args = parser.parse_args()
    size = "quick" if args.quick else "full"
    main(args.root, size, args.python, args.phases.split(","), args.anchors, args.rows, args.wait_for)

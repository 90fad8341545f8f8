"""The same 20 training steps on any mesh, in one process or several: `run`, and a script for a process of several.

`python mesh_steps.py DIRECTORY` runs on the meshes of `ACROSS`, goes on from the checkpoint in DIRECTORY/saved, and
saves one of its own to DIRECTORY/across. The first process writes what came out to .npz files there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from draft_helpers import SLIDING, packed_batch, random_frozen, random_params
from jax.sharding import Mesh

from jaxdraft import distributed
from jaxdraft.checkpoint import Checkpoints, abstract_like
from jaxdraft.config import DistributedConfig
from jaxdraft.losses import LossConfig
from jaxdraft.objective import batch_shardings
from jaxdraft.optim import OptimConfig
from jaxdraft.sharding import MESH_AXES, frozen_sharding, make_mesh
from jaxdraft.train_step import StepConfig, TrainState, init_state, make_train_step, state_shardings

# Sizes that no two arrays share, so that a shape in the HLO says what it is.
CONFIG = dataclasses.replace(SLIDING, vocab_size=104, intermediate_size=56, num_kv_heads=2, num_heads=4)
ROW_TOKENS, ROWS, ANCHORS = 44, 8, 14
LENGTHS = ((40,), (11, 20), (30,), (5, 6, 7, 8), (44,), (9, 35), (), (23, 3))
OPTIM = OptimConfig(learning_rate=3e-3, clip_norm=None)
STEPS, SAVED_AT = 20, 3
STEP = StepConfig(num_anchors=ANCHORS, total_steps=STEPS, compute_dtype="float32")
# The code that XLA makes is a little slower and the wait for it half as long.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

Sizes = tuple[int, int, int]
# Of two processes with four devices each: the axis that lies across them. For tensor, their devices take turns.
ACROSS: dict[str, Sizes] = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (2, 2, 2)}


def mesh_of(sizes: Sizes, across: str = "data") -> Mesh:
    """A mesh of the first devices, of every process in turn where tensor lies across them."""
    devices = jax.devices()
    if across == "tensor":
        devices = sorted(devices, key=lambda device: (device.id % jax.local_device_count(), device.process_index))
    return make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)), devices=devices[: math.prod(sizes)])


class Steps(NamedTuple):
    """A compiled step and its arguments on one mesh."""

    compiled: Any
    frozen: Any
    new_state: Callable[[], TrainState]
    batch: Any
    key: jax.Array

    def go_on(self, state: TrainState, number: int) -> tuple[list[float], TrainState]:
        """Losses of this many steps from `state`, which is donated."""
        losses = []
        for _ in range(number):
            state, metrics = self.compiled(self.frozen, state, self.batch, self.key)
            losses.append(float(metrics["loss"]))
        return losses, state


@functools.cache
def prepare(
    sizes: Sizes | None,
    across: str = "data",
    *,
    options: StepConfig = STEP,
    compiler_options: tuple[tuple[str, Any], ...] = (),
) -> Steps:
    """On a mesh of these sizes; None: on one device, without a mesh."""
    frozen, batch = random_frozen(CONFIG, 0), packed_batch(CONFIG, ROW_TOKENS, LENGTHS, 0, 0.8)
    key, mesh = jax.random.key(0), None if sizes is None else mesh_of(sizes, across)
    if mesh is not None:
        frozen = distributed.from_host(frozen, frozen_sharding(mesh))
        batch = jax.tree.map(distributed.from_host, batch, batch_shardings(mesh))

    def new_state() -> TrainState:
        state = init_state(CONFIG, OPTIM, STEP, key, params=random_params(CONFIG, 0))
        if mesh is None:
            return state
        return jax.tree.map(distributed.from_host, state, state_shardings(CONFIG, OPTIM, STEP, mesh))

    step = make_train_step(CONFIG, LossConfig(), OPTIM, options, frozen, mesh=mesh)
    compiled = step.func.lower(frozen, new_state(), batch, key).compile(FAST_COMPILE | dict(compiler_options))
    return Steps(compiled, frozen, new_state, batch, key)


class Run(NamedTuple):
    losses: list[float]
    gradients: dict[str, np.ndarray]
    """The first step's, as Adam's first moment holds them."""
    hlo: str
    parts: dict[str, tuple[str | int | None, ...]]
    """Sharding of each parameter."""


@functools.cache
def run(sizes: Sizes | None, across: str = "data") -> Run:
    """20 steps on a mesh."""
    steps = prepare(sizes, across)
    first, state = steps.go_on(steps.new_state(), 1)
    gradients = distributed.to_host(state.opt_state[0].mu)
    later, state = steps.go_on(state, STEPS - 1)
    parts = {} if sizes is None else {name: array.sharding.spec for name, array in state.params.items()}
    return Run(first + later, gradients, steps.compiled.as_text(), parts)


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Every leaf by its path, whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(distributed.to_host(state))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in flat}


def save(directory: Path, steps: Steps) -> tuple[dict[str, np.ndarray], list[float]]:
    """Saves after `SAVED_AT` steps: the saved leaves, and the losses of the steps after."""
    _, state = steps.go_on(steps.new_state(), SAVED_AT)
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(SAVED_AT, state, {})
        saved = leaves(state)
        losses, _ = steps.go_on(state, STEPS - SAVED_AT)  # while it is being written
    return saved, losses


def restore(directory: Path, steps: Steps) -> tuple[dict[str, np.ndarray], list[float]]:
    """The leaves of the checkpoint in `directory`, and the losses of the steps after it."""
    with Checkpoints(directory, keep=1, read_only=True) as checkpoints:
        state = checkpoints.restore(SAVED_AT, abstract_like(steps.new_state()))
    return leaves(state), steps.go_on(state, STEPS - SAVED_AT)[0]


def main(directory: Path) -> None:
    place = distributed.find_place(DistributedConfig(), os.environ)
    jax.distributed.initialize(place.address, place.count, place.index)

    def keep(name: str, arrays: dict[str, np.ndarray], losses: list[float]) -> None:
        if distributed.is_first():
            np.savez(directory / f"{name}.npz", losses=losses, **arrays)

    for across, sizes in ACROSS.items():
        result = run(sizes, across)
        keep(across, result.gradients, result.losses)
    keep("restored", *restore(directory / "saved", prepare(ACROSS["fsdp"], "fsdp")))
    keep("saved", *save(directory / "across", prepare(ACROSS["tensor"], "tensor")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

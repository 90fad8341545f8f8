"""Any split of a mesh computes the same numbers, with the collectives that are meant and no others."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import pytest
from draft_helpers import SLIDING, packed_batch, random_frozen, random_params

from jaxdraft.losses import LossConfig
from jaxdraft.objective import batch_shardings
from jaxdraft.optim import OptimConfig
from jaxdraft.sharding import MESH_AXES, frozen_sharding, make_mesh
from jaxdraft.train_step import StepConfig, init_state, make_train_step, state_shardings

# Sizes that no two arrays share, so that a shape in the HLO says what it is.
CONFIG = dataclasses.replace(SLIDING, vocab_size=104, intermediate_size=56, num_kv_heads=2, num_heads=4)
ROW_TOKENS, ROWS, ANCHORS = 44, 8, 14
LENGTHS = ((40,), (11, 20), (30,), (5, 6, 7, 8), (44,), (9, 35), (), (23, 3))
OPTIM = OptimConfig(learning_rate=3e-3, clip_norm=None)
STEP = StepConfig(num_anchors=ANCHORS, total_steps=20, compute_dtype="float32")
KEY = jax.random.key(0)
MESHES = [(2, 1, 1), (1, 1, 2), (1, 2, 2), (2, 4, 1), (2, 2, 2)]


class Run(NamedTuple):
    losses: list[float]
    """Of 20 steps."""
    gradients: dict[str, np.ndarray]
    """The first step's, as Adam's first moment holds them."""
    hlo: str
    parts: dict[str, tuple[str | int | None, ...]]
    """Sharding of each parameter."""


@functools.cache
def run(sizes: tuple[int, int, int] | None) -> Run:
    """20 steps on a mesh of these sizes; None: on one device, without a mesh."""
    frozen, batch = random_frozen(CONFIG, 0), packed_batch(CONFIG, ROW_TOKENS, LENGTHS, 0, 0.8)
    state, mesh = init_state(CONFIG, OPTIM, STEP, KEY, params=random_params(CONFIG, 0)), None
    if sizes is not None:
        data, fsdp, tensor = sizes
        mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: math.prod(sizes)])
        frozen = jax.device_put(frozen, frozen_sharding(mesh))
        state = jax.device_put(state, state_shardings(CONFIG, OPTIM, STEP, mesh))
        batch = jax.device_put(batch, batch_shardings(mesh))
    step = make_train_step(CONFIG, LossConfig(), OPTIM, STEP, frozen, mesh=mesh)
    compiled = step.func.lower(frozen, state, batch, KEY).compile()
    losses, gradients = [], None
    for _ in range(20):
        state, metrics = compiled(frozen, state, batch, KEY)
        losses.append(float(metrics["loss"]))
        gradients = gradients or jax.tree.map(np.array, state.opt_state[0].mu)
    parts = {} if mesh is None else {name: array.sharding.spec for name, array in state.params.items()}
    return Run(losses, gradients, compiled.as_text(), parts)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_same_numbers_on_any_mesh(sizes):
    single, ours = run(None), run(sizes)
    np.testing.assert_allclose(ours.losses[0], single.losses[0], rtol=1e-5)
    np.testing.assert_allclose(ours.losses, single.losses, rtol=1e-4)
    assert single.losses[-1] < 0.9 * single.losses[0]
    for name, expected in single.gradients.items():
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(ours.gradients[name], expected, rtol=1e-5, atol=atol, err_msg=name)


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of everything that the compiled step sends between devices; shapes are a device's own."""
    return {
        (kind, tuple(int(size) for size in shape.split(",") if size))
        for shapes, kind in COLLECTIVE.findall(hlo)
        for _, shape in SHAPE.findall(shapes)
    }


def parameter_shapes(sizes, *, split: Sequence[str]) -> set[tuple[int, ...]]:
    """The shape of each parameter divided by these mesh axes."""
    counts = dict(zip(MESH_AXES, sizes, strict=True))
    shapes = set()
    for name, spec in run(sizes).parts.items():
        shape = run(sizes).gradients[name].shape
        axes = [*spec, *[None] * len(shape)][: len(shape)]
        shapes.add(tuple(n // (counts[axis] if axis in split else 1) for n, axis in zip(shape, axes, strict=True)))
    return shapes


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_only_the_expected_collectives(sizes):
    found = collectives(run(sizes).hlo)
    data, fsdp, tensor = sizes
    rows, b, h = ROWS // (data * fsdp), CONFIG.block_size, CONFIG.hidden_size
    predicted = (rows, ANCHORS * (b - 1))  # of the cross entropy, one for each predicted slot
    weights, shards = (parameter_shapes(sizes, split=axes) for axes in (("tensor",), ("fsdp", "tensor")))
    bad_rows, sums = (ROWS,), {(), (2,), (b - 1,)}
    context, blocks = (rows, ROW_TOKENS, h), (rows, ANCHORS, b, h)

    # What each mesh axis is expected to send.
    gathers, reduces, permutes = {bad_rows}, weights | shards | sums, set()
    if fsdp > 1:
        gathers |= weights  # just before use
    if tensor > 1:
        gathers |= {context}  # c, K times smaller than the features
        reduces |= {blocks, context, predicted, (*predicted, h), (rows,)}  # row-parallel products; statistics of logits
        reduces |= {(rows, ANCHORS, h), (1, h)}  # embeddings, the vocabulary being split
        permutes |= {(1, h)}  # MASK's
    allowed = {"all-gather": gathers, "all-reduce": reduces, "collective-permute": permutes}
    surprises = {(kind, shape) for kind, shape in found if shape not in allowed.get(kind, ())}
    assert not surprises
    if tensor > 1:
        assert ("all-gather", context) in found
    if fsdp > 1:
        assert {shape for kind, shape in found if kind == "all-gather"} >= {
            shape for shape in weights if len(shape) > 1
        }

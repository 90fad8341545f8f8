"""Tiny drafts, random weights and random packed rows."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.model.dflash import DraftConfig, init_params
from jaxdraft.objective import Batch, Frozen

TINY = DraftConfig(
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=101,
    block_size=6,
    target_layer_ids=(1, 4),
    num_target_layers=8,
    mask_token_id=97,
    rope_theta=1e4,
)
SLIDING = dataclasses.replace(TINY, layer_types=("sliding_attention", "full_attention"), sliding_window=9)


def random_params(config: DraftConfig, seed: int) -> dict[str, jnp.ndarray]:
    """Weights larger than an initialisation's, norms away from 1: a wrong transpose or a missing norm must show."""
    rng = np.random.default_rng(seed)
    shapes = {name: array.shape for name, array in init_params(config, jax.random.key(seed)).items()}
    return {
        name: jnp.asarray(rng.normal(1.0, 0.2, shape) if len(shape) == 1 else rng.normal(0, 0.2, shape), jnp.float32)
        for name, shape in shapes.items()
    }


def random_frozen(config: DraftConfig, seed: int) -> Frozen:
    rng = np.random.default_rng(seed + 1)
    shape = (config.vocab_size, config.hidden_size)
    return Frozen(
        embedding=jnp.asarray(rng.normal(size=shape), jnp.float32),
        head=jnp.asarray(rng.normal(0, 0.5, size=shape), jnp.float32),
    )


def packed_batch(
    config: DraftConfig, row_tokens: int, lengths: tuple[tuple[int, ...], ...], seed: int, mask_rate: float = 1.0
) -> Batch:
    """Rows of random samples of these lengths; what is left of a row is padding, a segment of its own."""
    rng = np.random.default_rng(seed + 2)
    r = len(lengths)
    segment_start = np.zeros((r, row_tokens), np.int32)
    loss_mask = (rng.random((r, row_tokens)) < mask_rate).astype(np.uint8)
    features = rng.normal(size=(r, row_tokens, config.feature_size)).astype(np.float32)
    for row, row_lengths in enumerate(lengths):
        starts = np.cumsum((0, *row_lengths))
        assert starts[-1] <= row_tokens
        for start in starts:
            segment_start[row, start:] = start
        loss_mask[row, starts[-1] :] = 0
        features[row, starts[-1] :] = 0
    return Batch(
        tokens=jnp.asarray(rng.integers(0, config.vocab_size, (r, row_tokens)), jnp.int32),
        segment_start=jnp.asarray(segment_start),
        loss_mask=jnp.asarray(loss_mask),
        features=jnp.asarray(features),
        num_tokens=jnp.asarray([sum(row) for row in lengths], jnp.int32),
        row_ids=jnp.arange(r, dtype=jnp.int32) + 10 * seed,
    )


def samples_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, start, end) of every sample."""
    found = []
    for row, (starts, n) in enumerate(zip(np.asarray(batch.segment_start), np.asarray(batch.num_tokens), strict=True)):
        edges = [*np.unique(starts[:n]).tolist(), int(n)]
        found += [(row, a, b) for a, b in itertools.pairwise(edges)]
    return found

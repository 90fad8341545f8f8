"""Anchors: both rules, uniformity, and independence of everything but (seed, step, row id)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_helpers import TINY, packed_batch, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdraft.anchors import sample_anchors, sample_row_anchors

ROW_TOKENS, BLOCK = 60, 6
LENGTHS = ((60,), (20, 5, 30), (7, 1, 1, 40), (3,))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def draw(key, step, batch, num_anchors, block_size, rule):
    return sample_row_anchors(
        key,
        step,
        batch.row_ids,
        batch.loss_mask,
        batch.segment_start,
        batch.num_tokens,
        num_anchors=num_anchors,
        block_size=block_size,
        rule=rule,
    )


def allowed_positions(batch, row: int, rule: str) -> list[list[int]]:
    """The positions a rule allows, sample by sample."""
    mask, found = np.asarray(batch.loss_mask)[row], []
    for _, start, end in (x for x in samples_of(batch) if x[0] == row):
        if rule == "head":
            found.append([a for a in range(start, end - 1) if mask[a] and mask[a + 1]])
        else:
            found.append([a for a in range(start, end) if mask[a] and a - start <= end - start - BLOCK])
    return found


@pytest.mark.parametrize("rule", ["head", "pr505"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), mask_rate=st.sampled_from((0.0, 0.3, 0.8, 1.0)), many=st.booleans())
def test_anchors_are_valid_sorted_distinct_and_as_many_as_possible(rule, seed, mask_rate, many):
    batch, num_anchors = packed_batch(TINY, ROW_TOKENS, LENGTHS, seed % 1000, mask_rate), 70 if many else 9
    anchors, valid = draw(jax.random.key(seed), seed % 7, batch, num_anchors, BLOCK, rule)
    assert anchors.shape == valid.shape == (len(LENGTHS), num_anchors)
    assert anchors.dtype == jnp.int32
    for row in range(len(LENGTHS)):
        mine = np.asarray(anchors[row])[np.asarray(valid[row])].tolist()
        allowed = allowed_positions(batch, row, rule)
        assert np.all(np.asarray(valid[row])[: len(mine)])  # valid ones first
        assert np.all(np.asarray(anchors[row])[len(mine) :] == 0)
        assert mine == sorted(set(mine))
        assert set(mine) <= {a for sample in allowed for a in sample}
        spare = 1 if rule == "pr505" else 0
        assert len(mine) == min(num_anchors, sum(max(len(sample) - spare, 0) for sample in allowed))


@pytest.mark.parametrize("rule", ["head", "pr505"])
def test_uniform_without_replacement(rule):
    """Every allowed position of a row is drawn equally often, within five standard deviations."""
    batch, draws, num_anchors = packed_batch(TINY, ROW_TOKENS, LENGTHS[:1], 1, 0.8), 4000, 10
    sampler = jax.vmap(
        lambda key: sample_anchors(
            key, batch.loss_mask[0], batch.segment_start[0], batch.num_tokens[0], num_anchors, BLOCK, rule
        )
    )
    anchors, valid = jax.jit(sampler)(jax.random.split(jax.random.key(2), draws))
    assert bool(valid.all())
    allowed = allowed_positions(batch, 0, rule)[0]
    counts = np.bincount(np.asarray(anchors).ravel(), minlength=ROW_TOKENS)[allowed]
    share = num_anchors / len(allowed)
    assert np.all(np.abs(counts - draws * share) < 5 * np.sqrt(draws * share * (1 - share)))


def test_a_row_draws_the_same_in_any_batch_and_another_in_the_next_step():
    batch = packed_batch(TINY, ROW_TOKENS, LENGTHS, 3)
    order = jnp.asarray([2, 0])
    permuted = jax.tree.map(lambda x: x[order], batch)
    key = jax.random.key(4)
    anchors, valid = draw(key, 5, batch, 9, BLOCK, "head")
    again, valid_again = draw(key, 5, permuted, 9, BLOCK, "head")
    np.testing.assert_array_equal(again, anchors[order])
    np.testing.assert_array_equal(valid_again, valid[order])
    for other in (draw(key, 6, batch, 9, BLOCK, "head"), draw(jax.random.key(5), 5, batch, 9, BLOCK, "head")):
        assert not np.array_equal(other[0][0], anchors[0])

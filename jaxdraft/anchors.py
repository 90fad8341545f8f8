"""Anchors: where the blocks of a packed row begin. Uniform, without replacement, over all valid positions of the row.

Randomness is keyed by (seed, step, row id) only, so it does not depend on the number of devices or on a restart.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxdraft.losses import sample_end

AnchorRule = Literal["head", "pr505"]


def row_keys(key: Array, step: Int[Array, ""], row_ids: Int[Array, " r"]) -> Array:
    """One key a row: the run's key folded with the optimizer step and the row id."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(row_ids)


def candidates(
    loss_mask: Int[Array, " s"],
    segment_start: Int[Array, " s"],
    num_tokens: Int[Array, ""],
    block_size: int,
    rule: AnchorRule,
) -> Bool[Array, " s"]:
    """Positions that may be anchors, by the rule of SpecForge's main branch or of its pull request 505.

    head: the token and its successor are supervised and belong to one sample; the block may run past the sample's end.
    pr505: the token is supervised and the whole block lies inside the sample.
    """
    index = jnp.arange(loss_mask.shape[0])
    end = sample_end(segment_start[None], num_tokens[None])[0]
    supervised = (loss_mask > 0) & (index < num_tokens)
    if rule == "pr505":
        return supervised & (index + block_size <= end)
    assert rule == "head", rule
    return supervised & jnp.roll(supervised, -1) & (index + 1 < end)


def sample_anchors(
    key: Array,
    loss_mask: Int[Array, " s"],
    segment_start: Int[Array, " s"],
    num_tokens: Int[Array, ""],
    num_anchors: int,
    block_size: int,
    rule: AnchorRule = "head",
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Draws up to `num_anchors` anchors of one packed row; vmap it over rows.

    The pr505 rule leaves one random candidate of every sample unused (its count is min(N, candidates - 1)).

    Returns:
      (anchors, valid): valid ones first, ascending; the rest are 0 and invalid.
    """
    s = loss_mask.shape[0]
    eligible = candidates(loss_mask, segment_start, num_tokens, block_size, rule)
    draw = jnp.where(eligible, jax.random.uniform(key, (s,)), 2.0)
    if rule == "pr505":
        candidate_draw = jnp.where(eligible, draw, -1.0)
        largest = jnp.full((s,), -1.0).at[segment_start].max(candidate_draw)[segment_start]
        draw = jnp.where(candidate_draw == largest, 2.0, draw)
    smallest, anchors = jax.lax.top_k(-draw, min(num_anchors, s))
    anchors = jnp.sort(jnp.where(smallest > -2.0, anchors, s))
    anchors = jnp.pad(anchors, (0, num_anchors - anchors.shape[0]), constant_values=s)
    valid = anchors < s
    return jnp.where(valid, anchors, 0).astype(jnp.int32), valid


def sample_row_anchors(
    key: Array,
    step: Int[Array, ""],
    row_ids: Int[Array, " r"],
    loss_mask: Int[Array, "r s"],
    segment_start: Int[Array, "r s"],
    num_tokens: Int[Array, " r"],
    *,
    num_anchors: int,
    block_size: int,
    rule: AnchorRule = "head",
) -> tuple[Int[Array, "r n"], Bool[Array, "r n"]]:
    """`sample_anchors` for every row of a batch, keyed by (key, step, row id)."""

    def row(key, loss_mask, segment_start, num_tokens):
        return sample_anchors(key, loss_mask, segment_start, num_tokens, num_anchors, block_size, rule)

    return jax.vmap(row)(row_keys(key, step, row_ids), loss_mask, segment_start, num_tokens)

"""Attention of draft blocks over packed rows: one context interval a query, plus the block itself.

A query (block n, slot b) sees context keys [start, end) and the keys of its own block: all of them, or those up to its
own slot when `causal`. Both parts are attended separately and merged by log-sum-exp, so no [n·b, s + n·b] mask or score
array exists outside `reference`. The context part is a pair of functions (`ContextPart`) that a kernel can replace.

Dim suffixes: r rows, s context tokens, n blocks (c in a chunk), b slots of a query, j slots of a key, q query heads,
k key/value heads, g query heads a key/value head, d head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EMPTY = -1e30  # log-sum-exp of no key at all; finite, so that merging two empty parts gives 0 and not NaN
_SCORE_BYTES = 64 * 2**20  # float32 scores of one chunk of anchors

_einsum_32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class ContextPart(NamedTuple):
    """The context half of block attention. q is [r, n, b, k, g, d], start [r, n, b], end [r, n]; empty if end <= start.

    forward(q, k, v, start, end, scale) -> (out, lse), float32: like q and [r, n, b, k, g], EMPTY if no key is seen.
    backward(q, k, v, start, end, lse, delta, d_out, scale) -> (dq, dk, dv), float32. `lse` and `delta` = sum(out·d_out)
    are those of the *merged* attention, which makes the result this part's exact share of the gradient.
    """

    forward: Callable
    backward: Callable


def block_attention(
    q: Float[Array, "r n b q d"],
    k_context: Float[Array, "r s k d"],
    v_context: Float[Array, "r s k d"],
    k_block: Float[Array, "r n b k d"],
    v_block: Float[Array, "r n b k d"],
    start: Int[Array, "r n b"] | Int[Array, "r n"],
    end: Int[Array, "r n"],
    valid: Bool[Array, "r n"],
    *,
    causal: bool,
    scale: float,
    implementation: str = "auto",
) -> Float[Array, "r n b q d"]:
    """Attends each block to its context interval and to itself.

    Args:
      q: queries, already normalised and rotated, like the keys.
      k_context, v_context: keys and values of the packed row; `q // k` query heads share one.
      k_block, v_block: keys and values of the blocks.
      start: first visible context index, per block or per slot.
      end: one past the last visible context index (the anchor).
      valid: False for blocks that do not exist; their output and gradients are 0.
      causal: slot b sees block slots up to b only; otherwise all of them.
      scale: factor on the scores, head_dim ** -0.5.
      implementation: "auto", "reference" (dense, small inputs only), or a key of `IMPLEMENTATIONS`.

    Returns:
      The attention output in q's dtype; softmax statistics and accumulation are float32.

    Raises:
      ValueError: unknown implementation.
    """
    if start.ndim == 2:
        start = start[..., None]
    start = jnp.broadcast_to(start, q.shape[:3]).astype(jnp.int32)
    end = jnp.where(valid, end, 0).astype(jnp.int32)
    if implementation == "reference":
        return reference(q, k_context, v_context, k_block, v_block, start, end, valid, causal=causal, scale=scale)
    if implementation == "auto":
        implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention={implementation!r} is unknown; choose auto, reference or one of {sorted(IMPLEMENTATIONS)}"
        )
    return _merged(q, k_context, v_context, k_block, v_block, start, end, valid, causal, scale, implementation)


def reference(q, k_context, v_context, k_block, v_block, start, end, valid, *, causal: bool, scale: float):
    """The same by one dense float32 softmax over [n·b, s + n·b] scores: the definition, for tests."""
    (r, n, b, heads, d), (s, kv_heads) = q.shape, k_context.shape[1:3]
    dtype, group = q.dtype, heads // kv_heads
    k_all, v_all = (
        jnp.repeat(jnp.concatenate([c, x.reshape(r, n * b, kv_heads, d)], axis=1).astype(jnp.float32), group, axis=2)
        for c, x in ((k_context, k_block), (v_context, v_block))
    )
    index = jnp.arange(s)
    sees_context = (index >= start[..., None]) & (index < end[..., None, None])
    same_block = jnp.arange(n)[:, None, None, None] == jnp.arange(n)[None, None, :, None]
    before = (jnp.arange(b)[:, None] >= jnp.arange(b)[None, :]) | (not causal)
    sees_block = jnp.broadcast_to(same_block & before[None, :, None, :], (r, n, b, n, b))
    mask = jnp.concatenate([sees_context.reshape(r, n * b, s), sees_block.reshape(r, n * b, n * b)], axis=-1)
    mask = (mask & jnp.repeat(valid, b, axis=1)[..., None])[:, None]
    scores = jnp.einsum("rxqd,ryqd->rqxy", q.reshape(r, n * b, heads, d).astype(jnp.float32), k_all) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, EMPTY), axis=-1) * mask
    return jnp.einsum("rqxy,ryqd->rxqd", weights, v_all).reshape(q.shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _merged(q, k_context, v_context, k_block, v_block, start, end, valid, causal, scale, implementation):
    return _merged_forward(q, k_context, v_context, k_block, v_block, start, end, valid, causal, scale, implementation)[
        0
    ]


def _merged_forward(q, k_context, v_context, k_block, v_block, start, end, valid, causal, scale, implementation):
    grouped = _group(q, k_context.shape[2])
    out_c, lse_c = IMPLEMENTATIONS[implementation].forward(grouped, k_context, v_context, start, end, scale)
    out_b, lse_b = _block_forward(grouped, k_block, v_block, valid, causal, scale)
    lse = jnp.logaddexp(lse_c, lse_b)
    out = out_c * jnp.exp(lse_c - lse)[..., None] + out_b * jnp.exp(lse_b - lse)[..., None]
    out = out.astype(q.dtype)
    return out.reshape(q.shape), (q, k_context, v_context, k_block, v_block, start, end, valid, out, lse)


def _merged_backward(causal, scale, implementation, residuals, d_out):
    q, k_context, v_context, k_block, v_block, start, end, valid, out, lse = residuals
    grouped, d_out = _group(q, k_context.shape[2]), _group(d_out, k_context.shape[2])
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    dq_c, dk_c, dv_c = IMPLEMENTATIONS[implementation].backward(
        grouped, k_context, v_context, start, end, lse, delta, d_out, scale
    )
    dq_b, dk_b, dv_b = _block_backward(grouped, k_block, v_block, valid, lse, delta, d_out, causal, scale)
    dq = (dq_c + dq_b).reshape(q.shape).astype(q.dtype)
    d_context = (dk_c.astype(k_context.dtype), dv_c.astype(v_context.dtype))
    return dq, *d_context, dk_b.astype(k_block.dtype), dv_b.astype(v_block.dtype), None, None, None


_merged.defvjp(_merged_forward, _merged_backward)


def _group(x, kv_heads: int):
    """[r, n, b, q, d] -> [r, n, b, k, g, d]."""
    return x.reshape(*x.shape[:3], kv_heads, x.shape[3] // kv_heads, x.shape[4])


# The block part: b x b scores for each block, small enough to need no chunks.


def _block_mask(valid, b: int, causal: bool):
    mask_bj = jnp.tril(jnp.ones((b, b), bool)) if causal else jnp.ones((b, b), bool)
    return valid[:, :, None, None, None, None] & mask_bj[:, None, None, :]


def _block_forward(q, k, v, valid, causal, scale):
    mask = _block_mask(valid, q.shape[2], causal)
    scores = jnp.where(mask, _einsum_32("rnbkgd,rnjkd->rnbkgj", q, k) * scale, EMPTY)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1)
    out = _einsum_32("rnbkgj,rnjkd->rnbkgd", weights.astype(v.dtype), v)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return out / total[..., None], jnp.where(seen, peak[..., 0] + jnp.log(total), EMPTY)


def _block_backward(q, k, v, valid, lse, delta, d_out, causal, scale):
    mask = _block_mask(valid, q.shape[2], causal)
    weights = jnp.where(mask, jnp.exp(_einsum_32("rnbkgd,rnjkd->rnbkgj", q, k) * scale - lse[..., None]), 0.0)
    d_weights = _einsum_32("rnbkgd,rnjkd->rnbkgj", d_out, v)
    d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(q.dtype)
    dv = _einsum_32("rnbkgj,rnbkgd->rnjkd", weights.astype(q.dtype), d_out)
    return _einsum_32("rnbkgj,rnjkd->rnbkgd", d_scores, k), _einsum_32("rnbkgj,rnbkgd->rnjkd", d_scores, q), dv


# The context part in plain XLA: a scan over chunks of anchors; the backward recomputes a chunk's scores.


def _anchors_per_chunk(q, s: int) -> int:
    r, n, b, k, g, _ = q.shape
    return max(1, min(n, _SCORE_BYTES // (4 * r * b * k * g * s)))


def _to_chunks(x, size: int):
    """[r, n, ...] -> [chunks, r, size, ...], zero-padded; a padded block has end 0 and so sees nothing."""
    r, n = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -n % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(r, -1, size, *x.shape[2:]), 1, 0)


def _from_chunks(x, n: int):
    """Inverse of `_to_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]


def _context_mask(start, end, s: int):
    """[r, c, b] and [r, c] -> [r, 1, c, b, 1, s], to match scores [r, k, c, b, g, s]."""
    index = jnp.arange(s)
    return ((index >= start[..., None]) & (index < end[..., None, None]))[:, None, :, :, None, :]


def _xla_context_forward(q, k, v, start, end, scale):
    n, s = q.shape[1], k.shape[1]

    def chunk(_, x):
        q, start, end = x
        mask = _context_mask(start, end, s)
        scores = jnp.where(mask, _einsum_32("rcbkgd,rskd->rkcbgs", q, k) * scale, EMPTY)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
        total = jnp.einsum("rkcbgs->rcbkg", weights)
        out = _einsum_32("rkcbgs,rskd->rcbkgd", weights.astype(v.dtype), v)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, jnp.einsum("rkcbg->rcbkg", peak[..., 0]) + jnp.log(total), EMPTY)
        return None, (out / total[..., None], lse)

    size = _anchors_per_chunk(q, s)
    _, (out, lse) = jax.lax.scan(chunk, None, jax.tree.map(lambda x: _to_chunks(x, size), (q, start, end)))
    return _from_chunks(out, n), _from_chunks(lse, n)


def _xla_context_backward(q, k, v, start, end, lse, delta, d_out, scale):
    n, s = q.shape[1], k.shape[1]

    def chunk(carry, x):
        dk, dv = carry
        q, start, end, lse, delta, d_out = x
        lse, delta = (jnp.einsum("rcbkg->rkcbg", x)[..., None] for x in (lse, delta))
        scores = _einsum_32("rcbkgd,rskd->rkcbgs", q, k) * scale
        weights = jnp.where(_context_mask(start, end, s), jnp.exp(scores - lse), 0.0)
        d_weights = _einsum_32("rcbkgd,rskd->rkcbgs", d_out, v)
        d_scores = (weights * (d_weights - delta) * scale).astype(q.dtype)
        dv += _einsum_32("rkcbgs,rcbkgd->rskd", weights.astype(q.dtype), d_out)
        dk += _einsum_32("rkcbgs,rcbkgd->rskd", d_scores, q)
        return (dk, dv), _einsum_32("rkcbgs,rskd->rcbkgd", d_scores, k)

    size = _anchors_per_chunk(q, s)
    zeros = jnp.zeros(k.shape, jnp.float32)
    chunks = jax.tree.map(lambda x: _to_chunks(x, size), (q, start, end, lse, delta, d_out))
    (dk, dv), dq = jax.lax.scan(chunk, (zeros, zeros), chunks)
    return _from_chunks(dq, n), dk, dv


IMPLEMENTATIONS: dict[str, ContextPart] = {"xla": ContextPart(_xla_context_forward, _xla_context_backward)}

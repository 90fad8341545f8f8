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

from jaxdraft.ops.hopper import why_no_kernels

EMPTY = -1e30  # log-sum-exp of no key at all; finite, so that merging two empty parts gives 0 and not NaN

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
      implementation: "auto" (see `attention_choice`), "mosaic" (kernels for Hopper GPUs), "reference" (dense, small
        inputs only), or a key of `IMPLEMENTATIONS`.

    Returns:
      The attention output in q's dtype; softmax statistics and accumulation are float32.

    Raises:
      ValueError: unknown implementation, or "mosaic" where its kernels cannot run.
    """
    if start.ndim == 2:
        start = start[..., None]
    start = jnp.broadcast_to(start, q.shape[:3]).astype(jnp.int32)
    end = jnp.where(valid, end, 0).astype(jnp.int32)
    if implementation == "reference":
        return reference(q, k_context, v_context, k_block, v_block, start, end, valid, causal=causal, scale=scale)
    if implementation == "auto":
        implementation = attention_choice(q.dtype, q.shape[-1])
    if implementation == "mosaic":
        if reason := _why_not_mosaic(q.dtype, q.shape[-1]):
            raise ValueError(f"attention='mosaic' needs a Hopper GPU, but {reason}; use attention='auto' or 'xla'")
        from jaxdraft.ops import block_attention_mosaic  # needs a jaxlib with GPU support

        return block_attention_mosaic.attend(
            q, k_context, v_context, k_block, v_block, start, end, valid, causal=causal, scale=scale
        )
    if implementation not in IMPLEMENTATIONS:
        choices = ["auto", "mosaic", "reference", *sorted(IMPLEMENTATIONS)]
        raise ValueError(f"attention={implementation!r} is unknown; choose one of {', '.join(choices)}")
    return _merged(q, k_context, v_context, k_block, v_block, start, end, valid, causal, scale, implementation)


def attention_choice(dtype, head_dim: int, *, alone: bool | None = None) -> str:
    """What "auto" stands for: "mosaic" (kernels) on a single Hopper GPU in 16-bit precision, "xla" everywhere else.

    `alone`: see `why_no_kernels`; in a step every device is, whatever the mesh.
    """
    return "xla" if _why_not_mosaic(dtype, head_dim, alone=alone) else "mosaic"


def _why_not_mosaic(dtype, head_dim: int, *, alone: bool | None = None) -> str | None:
    if reason := why_no_kernels(alone=alone):
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or head_dim not in (64, 128):
        return f"its kernels take 16-bit numbers and a head_dim of 64 or 128, not {jnp.dtype(dtype)} and {head_dim}"
    return None


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


# The context part in plain XLA: a scan over chunks of anchors, and in it a loop over the tiles of keys that any query
# of the chunk sees. Anchors ascend, so these are few: the cost grows with the intervals, not with n times s.
# The loops' trip counts depend on the data; that is allowed here because autodiff never sees them.
#
# x: the queries of a chunk that share keys, c·b·g of them; t: keys of a tile.


def _sizes(q) -> tuple[int, int]:
    """(anchors of a chunk, keys of a tile): small enough for a CPU's cache, large enough to fill a GPU."""
    queries, tile = (512, 128) if jax.default_backend() == "cpu" else (4096, 512)
    return max(1, min(q.shape[1], queries // (q.shape[2] * q.shape[4]))), tile


def _chunks(x, size: int):
    """[r, n, ...] -> [chunks, r, size, ...], zero-padded; a padded block has end 0 and so sees nothing."""
    r, n = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -n % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(r, -1, size, *x.shape[2:]), 1, 0)


def _query_chunks(x, size: int):
    """[r, n, b, k, g, ...] -> [chunks, r, k, x, ...]."""
    x = jnp.moveaxis(_chunks(x, size), 4, 2)
    return x.reshape(*x.shape[:3], -1, *x.shape[6:])


def _from_query_chunks(x, shape: tuple[int, ...]):
    """Inverse of `_query_chunks` for `shape` = (r, n, b, k, g, ...)."""
    r, n, b, k, g, *rest = shape
    x = x.reshape(x.shape[0], r, k, -1, b, g, *rest)
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    return x.reshape(r, -1, b, k, g, *rest)[:, :n]


def _bounds(start, end, group: int, size: int):
    """Chunks of each query's interval, [chunks, r, 1, x, 1], empty ones as [0, 0)."""
    end = jnp.broadcast_to(end[..., None], start.shape)
    start, end = (jnp.where(end > start, x, 0) for x in (start, end))
    per_query = (jnp.broadcast_to(x[:, :, :, None, None], (*x.shape, 1, group)) for x in (start, end))
    return tuple(_query_chunks(x, size)[..., None] for x in per_query)


def _tiles(start, end, tile: int):
    """The range of tiles that a chunk's queries see."""
    first = jnp.min(jnp.where(end > start, start, jnp.iinfo(jnp.int32).max)) // tile
    return first, jnp.maximum(first, -(-jnp.max(end) // tile))


def _key_tiles(x, tile: int):
    """[r, s, k, d] -> [r, k, s, d], padded to whole tiles."""
    return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -x.shape[1] % tile), (0, 0)))


def _tile_mask(start, end, index, tile: int):
    position = index * tile + jnp.arange(tile)
    return (position >= start) & (position < end)


def _xla_context_forward(q, k, v, start, end, scale):
    size, tile = _sizes(q)
    k, v = _key_tiles(k, tile), _key_tiles(v, tile)

    def chunk(_, x):
        q, start, end = x

        def attend(index, carry):
            out, peak, total = carry
            k_t, v_t = (jax.lax.dynamic_slice_in_dim(x, index * tile, tile, axis=2) for x in (k, v))
            mask = _tile_mask(start, end, index, tile)
            scores = jnp.where(mask, _einsum_32("rkxd,rktd->rkxt", q, k_t) * scale, EMPTY)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - new_peak), 0.0)
            fade = jnp.exp(peak - new_peak)
            out = out * fade + _einsum_32("rkxt,rktd->rkxd", weights.astype(v.dtype), v_t)
            return out, new_peak, total * fade + jnp.sum(weights, axis=-1, keepdims=True)

        one = (*q.shape[:-1], 1)
        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(one, EMPTY, jnp.float32), jnp.zeros(one, jnp.float32))
        out, peak, total = jax.lax.fori_loop(*_tiles(start, end, tile), attend, nothing)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        return None, (out / total, jnp.where(seen, peak + jnp.log(total), EMPTY)[..., 0])

    bounds = _bounds(start, end, q.shape[4], size)
    _, (out, lse) = jax.lax.scan(chunk, None, (_query_chunks(q, size), *bounds))
    return _from_query_chunks(out, q.shape), _from_query_chunks(lse, q.shape[:-1])


def _xla_context_backward(q, k, v, start, end, lse, delta, d_out, scale):
    size, tile = _sizes(q)
    s = k.shape[1]
    k, v = _key_tiles(k, tile), _key_tiles(v, tile)

    def chunk(carry, x):
        q, start, end, lse, delta, d_out = x

        def attend(index, carry):
            dk, dv, dq = carry
            k_t, v_t, dk_t, dv_t = (jax.lax.dynamic_slice_in_dim(x, index * tile, tile, axis=2) for x in (k, v, dk, dv))
            scores = _einsum_32("rkxd,rktd->rkxt", q, k_t) * scale
            weights = jnp.where(_tile_mask(start, end, index, tile), jnp.exp(scores - lse[..., None]), 0.0)
            d_weights = _einsum_32("rkxd,rktd->rkxt", d_out, v_t)
            d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(q.dtype)
            dv_t += _einsum_32("rkxt,rkxd->rktd", weights.astype(q.dtype), d_out)
            dk_t += _einsum_32("rkxt,rkxd->rktd", d_scores, q)
            dk, dv = (
                jax.lax.dynamic_update_slice_in_dim(x, x_t, index * tile, axis=2) for x, x_t in ((dk, dk_t), (dv, dv_t))
            )
            return dk, dv, dq + _einsum_32("rkxt,rktd->rkxd", d_scores, k_t)

        nothing = jnp.zeros(q.shape, jnp.float32)
        dk, dv, dq = jax.lax.fori_loop(*_tiles(start, end, tile), attend, (*carry, nothing))
        return (dk, dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    q_c, lse_c, delta_c, d_out_c = (_query_chunks(x, size) for x in (q, lse, delta, d_out))
    bounds = _bounds(start, end, q.shape[4], size)
    (dk, dv), dq = jax.lax.scan(chunk, (zeros, zeros), (q_c, *bounds, lse_c, delta_c, d_out_c))
    return _from_query_chunks(dq, q.shape), *(jnp.moveaxis(x[:, :, :s], 1, 2) for x in (dk, dv))


IMPLEMENTATIONS: dict[str, ContextPart] = {"xla": ContextPart(_xla_context_forward, _xla_context_backward)}

"""Block attention on Hopper GPUs: flash attention of context interval and own block in one kernel.

Three kernels (the forward here, two of the backward in block_attention_mosaic_vjp.py) walk only over the tiles that the
queries of a tile can see: blocks are in the order of their anchors, so these are few, and most of them are seen whole
and need no mask. The work grows with the length of the intervals, not with context times queries.

Compute: two warpgroups, each 64 queries (or keys) wide, that take turns at the tensor cores; a third one moves tiles to
shared memory, `stages` ahead. Sources: FlashAttention 2 and 3 (arXiv 2307.08691, 2407.08608).

Dim suffixes: r rows, n blocks, b slots, t queries (n·b, padded), u keys, q query heads, k key/value heads, d head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdraft.ops.block_attention_mosaic_vjp import backward_kv, backward_q
from jaxdraft.ops.block_attention_tiles import HALF, TILE, key_lists, query_tiles
from jaxdraft.ops.mosaic_common import (
    LOG2E,
    ROW,
    Options,
    Tuning,
    add_product,
    call,
    copy_to,
    load_pipeline,
    load_vectors,
    mask,
    smem,
    spread,
    staging_for,
    tile_reader,
)

_LOW = -1e30  # a running maximum before any key; finite, so that differences are never NaN


@functools.partial(jax.jit, static_argnames=("causal", "scale", "tuning", "interpret"))  # one lowering for all layers
def attend(
    q, k_context, v_context, k_block, v_block, start, end, valid, *, causal, scale, tuning=None, interpret=False
):
    """`block_attention` on the kernels; bfloat16 or float16, head_dim a multiple of 64. start [r, n, b], end [r, n]."""
    lists, plan = key_lists(q, k_context, v_context, k_block, v_block, start, end, valid, causal)
    options = Options(scale=scale, tuning=tuning or Tuning(), interpret=interpret)
    out = _attention(*lists, plan, options)
    return out[:, : q.shape[1] * q.shape[2]].reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, intervals, options):
    return _forward(q, k, v, intervals, options)[0]


def _attention_forward(q, k, v, intervals, options):
    out, lse = _forward(q, k, v, intervals, options)
    return out, (q, k, v, intervals, out, lse)


def _attention_backward(options, residuals, d_out):
    q, k, v, intervals, out, lse = residuals
    delta = jnp.einsum("rtqd,rtqd->rqt", out, d_out, preferred_element_type=jnp.float32)
    args = (q, k, v, d_out.astype(q.dtype), lse, delta, intervals)
    return backward_q(*args, options), *backward_kv(*args, options), None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, intervals, options):
    """(out like q, lse [r, q, t] float32 in base 2; +inf for a query without keys)."""
    (r, t, heads, d), kv_heads = q.shape, k.shape[2]
    group, keys, stages = heads // kv_heads, options.tuning.forward_keys, options.tuning.forward_stages
    factor = options.scale * LOG2E
    shape = (HALF, keys)

    def body(
        q_ref, k_ref, v_ref, intervals_ref, table_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, *barriers
    ):
        q_full, k_full, v_full, k_free, v_free, turn, *staging = barriers
        row, head, wg = (lax.axis_index(x) for x in ("rows", "heads", "wg"))
        tile = t // TILE - 1 - lax.axis_index("tiles")  # the longest intervals first
        reader = _, steps, key_tile, _ = tile_reader(table_ref, row, tile)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            queries = pl.ds(tile * TILE + wg * HALF, HALF)
            q_tile = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[wg])
            ranges = load_vectors([intervals_ref.at[row, i, queries] for i in range(4)], ROW)
            plgpu.barrier_wait(q_full.at[wg])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            pl.when(wg == 1)(take_turns)

            def step(i, carry):
                acc, peak, total = carry
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                def scores(acc_ref):
                    plgpu.wgmma(acc_ref, q_tile, k_smem.at[slot].T)
                    take_turns()
                    return acc_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])

                s = mask(s, -jnp.inf, i, reader, keys, ranges)
                new_peak = jnp.maximum(peak, jnp.max(s, axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                p = jnp.exp2(s * factor - spread(new_peak, shape, 0))
                total = total * shrink + jnp.sum(p, axis=1)
                acc = acc * spread(shrink, acc.shape, 0)
                p = p.astype(v.dtype)
                acc, total, new_peak, p = lax.optimization_barrier((acc, total, new_peak, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = add_product(acc, p, v_smem.at[slot], staging)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_peak, total

            peak = plgpu.layout_cast(jnp.full((HALF,), _LOW, jnp.float32), ROW)
            total = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            acc = plgpu.layout_cast(jnp.zeros((HALF, d), jnp.float32), plgpu.Layout.WGMMA)
            acc, peak, total = lax.fori_loop(0, steps, step, (acc, peak, total))
            pl.when(wg == 0)(take_turns)

            seen = total > 0.0
            safe = jnp.where(seen, total, 1.0)
            q_tile[...] = (acc * spread(1.0 / safe, acc.shape, 0)).astype(q.dtype)
            lse_smem.at[wg][...] = jnp.where(seen, peak + jnp.log(safe) * LOG2E, jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, queries, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[row, head, queries])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            def source(ref):
                return lambda i: ref.at[row, pl.ds(key_tile(i) * keys, keys), lax.div(head, jnp.int32(group))]

            copies = [copy_to(k_smem, source(k_ref), k_free), copy_to(v_smem, source(v_ref), v_free)]
            load_pipeline(steps, stages, copies, [k_full, v_full])

    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    return call(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((r, heads, t), jnp.float32)],
        scratch=[
            smem(2, HALF, d, dtype=q.dtype),
            smem(stages, keys, d, dtype=k.dtype),
            smem(stages, keys, d, dtype=v.dtype),
            plgpu.SMEM((2, HALF), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            barrier(),
            barrier(),
            barrier(num_arrivals=2),
            barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            *staging_for(keys, q.dtype, options),
        ],
        grid=(r, t // TILE, heads),
        options=options,
    )(q, k, v, intervals, query_tiles(intervals, keys))

"""Block attention on Hopper GPUs: flash attention of context interval and own block in one kernel.

Three kernels (the forward here, two of the backward in block_attention_mosaic_vjp.py) walk only over the tiles that the
queries of a tile can see: blocks are in the order of their anchors, so these are few, and most of them are seen whole
and need no mask. The work grows with the length of the intervals, not with context times queries.

Compute: two warpgroups, each 64 queries (or keys) wide, that share the tensor cores; a third one moves tiles to shared
memory, `stages` ahead, across the border from one tile of queries to the next. Sources: FlashAttention 2 and 3
(arXiv 2307.08691, 2407.08608).

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
from jaxdraft.ops.block_attention_tiles import HALF, PLAN, TILE, key_lists, query_tiles
from jaxdraft.ops.mosaic_common import (
    LOG2E,
    ROW,
    Options,
    Ring,
    Tuning,
    call,
    free_stored,
    inside,
    multiply_add,
    multiprocessors,
    run_warpgroups,
    set_accumulator,
    spread,
    staging_for,
    vector,
    visit_tiles,
)

_LOW = -1e30  # a running maximum before any key; finite, so that differences are never NaN


@functools.partial(jax.jit, static_argnames=("causal", "scale", "tuning", "interpret"))  # one lowering for all layers
def attend(
    q, k_context, v_context, k_block, v_block, start, end, valid, *, causal, scale, tuning=None, interpret=False
):
    """`block_attention` on the kernels; bfloat16 or float16, head_dim 64 or 128. start [r, n, b], end [r, n]."""
    lists, intervals = key_lists(q, k_context, v_context, k_block, v_block, start, end, valid, causal)
    options = Options(scale=scale, tuning=tuning or Tuning(), interpret=interpret)
    out = _attention(*lists, intervals, options)
    return out[:, : q.shape[1] * q.shape[2]].reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, intervals, options):
    return _forward(q, k, v, intervals, options)[0]


def _attention_forward(q, k, v, intervals, options):
    out, lse = _forward(q, k, v, intervals, options)
    return out, (q, k, v, intervals, out, lse)


def _attention_backward(options, residuals, d_out):
    q, k, v, intervals, out, lse = residuals
    d_out = d_out.astype(q.dtype)
    dq, delta = backward_q(q, k, v, d_out, out, lse, intervals, options)
    return dq, *backward_kv(q, k, v, d_out, lse, delta, intervals, options), None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, intervals, options):
    """(out like q, lse [r, q, t] float32 in base 2; +inf for a query without keys)."""
    (r, t, heads, d), kv_heads = q.shape, k.shape[2]
    tuning, factor = options.tuning, options.scale * LOG2E

    def body(q_ref, k_ref, v_ref, intervals_ref, plan_ref, out_ref, lse_ref, queries, k_ring, v_ring, *scratch):
        bounds_smem, plan_smem, lse_smem, *staging = scratch
        wg = lax.axis_index("wg")

        def compute(index, row, tile, head, done):
            slot = queries.slot(index)
            queries.wait(index)
            plan = plan_smem.at[slot]
            context, num_context, block, num_block = (plan[i] for i in range(4))
            own, own_end, whole, whole_end = (plan[6 + 6 * wg + i] for i in range(4))
            q_tile, bounds = queries.tiles.at[slot, wg], bounds_smem.at[slot, wg]

            def seen(s, key_base, interval):
                lo, hi = (vector(bounds.at[2 * interval + i], ROW) for i in range(2))
                return jnp.where(inside(s.shape, key_base, lo, hi, keys_axis=1), s, -jnp.inf)

            def softmax(s, peak, total):
                new_peak = jnp.maximum(peak, jnp.max(s, axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                p = jnp.exp2(s * factor - spread(new_peak, s.shape, 0))
                return p, shrink, new_peak, total * shrink + jnp.sum(p, axis=1)

            def scores(k_tile):
                def product(s_acc):
                    plgpu.wgmma(s_acc, q_tile, k_tile.T)
                    return s_acc[...]

                return pl.run_scoped(product, plgpu.ACC((HALF, k_tile.shape[0]), jnp.float32))

            def attend(acc_ref):
                def fade(shrink, wait=None):
                    acc = plgpu.wgmma_accumulator_load(acc_ref, wait_n=wait)
                    set_accumulator(acc_ref, acc * spread(shrink, acc.shape, 0), options)

                def own_block(i, carry):
                    n = done + i
                    k_ring.wait(n)
                    v_ring.wait(n)
                    halves = 2 * (block + i)  # the tile's keys in units of 64

                    def half(h, carry):
                        keys = pl.ds(pl.multiple_of((h - halves) * HALF, HALF), HALF)
                        s = seen(scores(k_ring.tiles.at[k_ring.slot(n), keys]), h * HALF, 1)
                        p, shrink, *carry = softmax(s, *carry)
                        fade(shrink)
                        multiply_add(acc_ref, p.astype(v.dtype), v_ring.tiles.at[v_ring.slot(n), keys], staging)
                        plgpu.wgmma_wait(0)
                        return tuple(carry)

                    carry = lax.fori_loop(jnp.maximum(own, halves), jnp.minimum(own_end, halves + 2), half, carry)
                    k_ring.release(n)
                    v_ring.release(n)
                    return carry

                def masked(s, i):
                    whole_tile = (context + i >= whole) & (context + i < whole_end)
                    return lax.cond(whole_tile, lambda: s, lambda: seen(s, (context + i) * TILE, 0))

                def interval(peak, total):
                    """The context: scores of tile i beside the output of tile i - 1, the softmax beside the latter."""
                    first = done + num_block
                    k_ring.wait(first)
                    s = scores(k_ring.tile(first))
                    k_ring.release(first)
                    p, shrink, peak, total = softmax(masked(s, 0), peak, total)
                    fade(shrink)
                    v_ring.wait(first)

                    def step(i, carry):
                        p, peak, total = carry
                        n = first + i
                        k_ring.wait(n)

                        def products(s_acc):
                            plgpu.wgmma(s_acc, q_tile, k_ring.tile(n).T)
                            multiply_add(acc_ref, p, v_ring.tile(n - 1), staging)
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                            k_ring.release(n)
                            new_p, shrink, *new = lax.optimization_barrier(softmax(masked(s, i), peak, total))
                            v_ring.wait(n)  # here, because the compiler moves no wait for a product across it
                            fade(shrink, wait=0)
                            v_ring.release(n - 1)
                            # Rounded only now: registers of a running product's operands must not be written.
                            return lax.optimization_barrier(new_p).astype(v.dtype), *new

                        return pl.run_scoped(products, plgpu.ACC((HALF, TILE), jnp.float32))

                    carry = p.astype(v.dtype), peak, total
                    p, peak, total = lax.fori_loop(jnp.int32(1), num_context, step, carry)
                    last = first + num_context - 1
                    multiply_add(acc_ref, p, v_ring.tile(last), staging)
                    plgpu.wgmma_wait(0)
                    v_ring.release(last)
                    return peak, total

                nothing = jnp.full((HALF,), _LOW, jnp.float32), jnp.zeros((HALF,), jnp.float32)
                carry = tuple(plgpu.layout_cast(x, ROW) for x in nothing)
                carry = lax.fori_loop(jnp.int32(0), num_block, own_block, carry)
                free_stored(queries, index)
                carry = lax.cond(num_context > 0, interval, lambda *x: x, *carry)
                return acc_ref[...], *carry

            acc, peak, total = pl.run_scoped(attend, plgpu.ACC((HALF, d), jnp.float32))
            found = total > 0.0
            safe = jnp.where(found, total, 1.0)
            q_tile[...] = (acc * spread(1.0 / safe, acc.shape, 0)).astype(q.dtype)
            lse_smem.at[wg][...] = jnp.where(found, peak + jnp.log(safe) * LOG2E, jnp.inf)
            plgpu.commit_smem()
            rows = pl.ds(tile * TILE + wg * HALF, HALF)
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[row, head, rows])
            return done + num_block + num_context

        def load(index, row, tile, head, done):
            context, num_context, block, num_block = (plan_ref[row, tile, i] for i in range(4))
            slot, full = queries.slot(index), queries.reserve(index)
            plgpu.copy_gmem_to_smem(plan_ref.at[row, tile], plan_smem.at[slot], full)
            for half in range(2):
                rows = pl.ds(tile * TILE + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], queries.tiles.at[slot, half], full)
                for i in range(4):
                    plgpu.copy_gmem_to_smem(intervals_ref.at[row, i, rows], bounds_smem.at[slot, half, i], full)

            @pl.loop(0, num_block + num_context)
            def _step(i):
                at = jnp.where(i < num_block, block + i, context + i - num_block)
                keys, kv_head = pl.ds(at * TILE, TILE), lax.div(head, jnp.int32(heads // kv_heads))
                k_ring.fill(done + i, k_ref.at[row, keys, kv_head])
                v_ring.fill(done + i, v_ref.at[row, keys, kv_head])

            return done + num_block + num_context

        walk = functools.partial(visit_tiles, r, t // TILE, heads)
        run_warpgroups(wg, walk, compute, load, queries, (k_ring, v_ring))

    return call(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((r, heads, t), jnp.float32)],
        scratch=[
            Ring.scratch(2, 2, HALF, d, dtype=q.dtype, copies=11),
            Ring.scratch(tuning.forward_stages, TILE, d, dtype=k.dtype),
            Ring.scratch(tuning.forward_stages, TILE, d, dtype=v.dtype),
            plgpu.SMEM((2, 2, 4, HALF), jnp.int32),
            plgpu.SMEM((2, PLAN), jnp.int32),
            plgpu.SMEM((2, HALF), jnp.float32),
            *staging_for(TILE, q.dtype, options),
        ],
        grid={"blocks": min(tuning.thread_blocks or multiprocessors(), r * (t // TILE) * heads)},
        options=options,
    )(q, k, v, intervals, query_tiles(intervals, TILE))

"""The backward kernels of block attention on Hopper GPUs: one for the queries, one for keys and values.

Both recompute the weights of a tile from the forward's log-sum-exp. See block_attention_mosaic.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdraft.ops.block_attention_tiles import HALF, PLAN, TILE, key_tiles, query_tiles
from jaxdraft.ops.mosaic_common import (
    COL,
    LOG2E,
    ROW,
    Ring,
    call,
    free_stored,
    inside,
    multiply_add,
    multiprocessors,
    run_warpgroups,
    set_accumulator,
    smem,
    spread,
    staging_for,
    vector,
    visit_tiles,
)

_SQUARE = (HALF, HALF)


def backward_q(q, k, v, d_out, out, lse, intervals, options):
    """(the queries' gradient, like q, delta = sum(out·d_out), float32 like lse)."""
    (r, t, heads, d), kv_heads = q.shape, k.shape[2]
    tuning, factor = options.tuning, options.scale * LOG2E

    def body(q_ref, k_ref, v_ref, d_out_ref, out_ref, lse_ref, intervals_ref, plan_ref, dq_ref, delta_ref, *scratch):
        queries, d_out_smem, k_ring, v_ring, bounds_smem, lse_smem, delta_smem, plan_smem, *staging = scratch
        wg = lax.axis_index("wg")

        def compute(index, row, tile, head, done):
            slot = queries.slot(index)
            queries.wait(index)
            plan = plan_smem.at[slot]
            context, num_context, block, num_block = (plan[i] for i in range(4))
            near, near_end, own, own_end, whole, whole_end = (plan[4 + 6 * wg + i] for i in range(6))
            q_tile, d_out_tile, bounds = queries.tiles.at[slot, wg], d_out_smem.at[slot, wg], bounds_smem.at[slot, wg]
            rows = pl.ds(tile * TILE + wg * HALF, HALF)
            lse = vector(lse_smem.at[slot, wg], ROW)

            def row_sums():
                """delta, from the forward's output, which came in the places of a key and a value tile."""
                k_ring.wait(done)
                v_ring.wait(done)

                def dot(out):
                    out, d_out = (plgpu.load(x, layout=plgpu.Layout.WGMMA) for x in (out, d_out_tile))
                    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=1)

                delta = lax.cond(wg == 0, lambda: dot(k_ring.tile(done)), lambda: dot(v_ring.tile(done)))
                k_ring.release(done)
                v_ring.release(done)
                free_stored(queries, index)
                delta_smem.at[wg][...] = delta
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(delta_smem.at[wg], delta_ref.at[row, head, rows])
                return delta

            delta = row_sums()

            def walk_keys(dq_acc, begin, first, count, mine, mine_end, interval):
                """Tiles first .. first + count of one interval; this warpgroup's queries see those from `mine` on."""
                lo = jnp.clip(mine - first, 0, count)
                hi = jnp.clip(mine_end - first, lo, count)

                def skip(start, end):
                    @pl.loop(start, end)
                    def _skip(i):
                        for ring in (k_ring, v_ring):
                            ring.wait(begin + i)
                            ring.release(begin + i)

                skip(0, lo)

                @pl.loop(lo, hi)
                def _step(i):
                    n, key_base = begin + i, (first + i) * HALF
                    k_ring.wait(n)
                    v_ring.wait(n)

                    def products(s_acc, dp_acc):
                        set_accumulator(dp_acc, spread(-delta, _SQUARE, 0), options)
                        plgpu.wgmma(s_acc, q_tile, k_ring.tile(n).T)
                        plgpu.wgmma(dp_acc, d_out_tile, v_ring.tile(n).T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        p = jnp.exp2(s * factor - spread(lse, _SQUARE, 0))

                        def masked():
                            lo, hi = (vector(bounds.at[2 * interval + i], ROW) for i in range(2))
                            return jnp.where(inside(_SQUARE, key_base, lo, hi, keys_axis=1), p, 0.0)

                        seen_whole = (interval == 0) & (first + i >= whole) & (first + i < whole_end)
                        return lax.cond(seen_whole, lambda: p, masked), dp_acc[...]

                    p, dp = pl.run_scoped(products, *[plgpu.ACC(_SQUARE, jnp.float32)] * 2)
                    v_ring.release(n)
                    multiply_add(dq_acc, (p * dp).astype(k.dtype), k_ring.tile(n), staging)
                    plgpu.wgmma_wait(0)
                    k_ring.release(n)

                skip(hi, count)

            def accumulate(dq_acc):
                walk_keys(dq_acc, done + 1, context, num_context, near, near_end, 0)
                walk_keys(dq_acc, done + 1 + num_context, block, num_block, own, own_end, 1)
                return dq_acc[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((HALF, d), jnp.float32))
            q_tile[...] = (dq * options.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, rows, head])
            return done + 1 + num_context + num_block

        def load(index, row, tile, head, done):
            context, num_context, block, num_block = (plan_ref[row, tile, i] for i in range(4))
            slot, full = queries.slot(index), queries.reserve(index)
            plgpu.copy_gmem_to_smem(plan_ref.at[row, tile], plan_smem.at[slot], full)
            for half, ring in enumerate((k_ring, v_ring)):
                rows = pl.ds(tile * TILE + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], queries.tiles.at[slot, half], full)
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, rows, head], d_out_smem.at[slot, half], full)
                plgpu.copy_gmem_to_smem(lse_ref.at[row, head, rows], lse_smem.at[slot, half], full)
                for i in range(4):
                    plgpu.copy_gmem_to_smem(intervals_ref.at[row, i, rows], bounds_smem.at[slot, half, i], full)
                ring.fill(done, out_ref.at[row, rows, head])

            @pl.loop(0, num_context + num_block)
            def _step(i):
                at = jnp.where(i < num_context, context + i, block + i - num_context)
                keys, kv_head = pl.ds(at * HALF, HALF), lax.div(head, jnp.int32(heads // kv_heads))
                k_ring.fill(done + 1 + i, k_ref.at[row, keys, kv_head])
                v_ring.fill(done + 1 + i, v_ref.at[row, keys, kv_head])

            return done + 1 + num_context + num_block

        walk = functools.partial(visit_tiles, r, t // TILE, heads)
        run_warpgroups(wg, walk, compute, load, queries, (k_ring, v_ring))

    return call(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
        scratch=[
            Ring.scratch(2, 2, HALF, d, dtype=q.dtype, copies=15),
            smem(2, 2, HALF, d, dtype=q.dtype),
            Ring.scratch(tuning.dq_key_stages, HALF, d, dtype=k.dtype),
            Ring.scratch(tuning.dq_value_stages, HALF, d, dtype=v.dtype),
            plgpu.SMEM((2, 2, 4, HALF), jnp.int32),
            plgpu.SMEM((2, 2, HALF), jnp.float32),
            plgpu.SMEM((2, HALF), jnp.float32),
            plgpu.SMEM((2, PLAN), jnp.int32),
            *staging_for(HALF, q.dtype, options),
        ],
        grid={"blocks": min(tuning.thread_blocks or multiprocessors(), r * (t // TILE) * heads)},
        options=options,
    )(q, k, v, d_out, out, lse, intervals, query_tiles(intervals, HALF))


def backward_kv(q, k, v, d_out, lse, delta, intervals, options):
    """The gradients of keys and values, like them.

    A tile of context keys is seen by many queries: `dkv_parts` thread blocks share these, and their sums are added up.
    """
    (r, t, heads, d), (u, kv_heads) = q.shape, k.shape[1:3]
    group, stages, parts = heads // kv_heads, options.tuning.dkv_stages, options.tuning.dkv_parts
    factor = options.scale * LOG2E
    context_tiles = (u - t) // TILE
    shared = context_tiles * parts

    def body(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, intervals_ref, plan_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, kv_full, q_ring, d_out_ring, lse_smem, delta_smem, lo_smem, hi_smem, *staging = scratch
        row, item, kv_head, wg = (lax.axis_index(x) for x in ("rows", "items", "heads", "wg"))
        in_context = item < shared
        tile = jnp.where(in_context, lax.div(item, jnp.int32(parts)), item - (shared - context_tiles))
        part = jnp.where(in_context, lax.rem(item, jnp.int32(parts)), 0)
        num_parts = jnp.where(in_context, parts, 1)
        first, count = (plan_ref[row, tile, i] for i in range(2))
        begin, end = (first + lax.div((part + i) * count, num_parts) for i in range(2))
        steps = (end - begin) * group

        def place(i):  # downwards: the thread blocks of all key tiles begin with the same queries
            return end - 1 - lax.div(i, jnp.int32(group)), kv_head * group + lax.rem(i, jnp.int32(group))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            key_base = tile * TILE + wg * HALF
            k_tile, v_tile = k_smem.at[wg], v_smem.at[wg]
            for ref, x in ((k_ref, k_tile), (v_ref, v_tile)):
                plgpu.copy_gmem_to_smem(ref.at[row, pl.ds(key_base, HALF), kv_head], x, kv_full.at[wg])
            mine, mine_end, whole, whole_end = (plan_ref[row, tile, 2 + 4 * wg + i] for i in range(4))
            plgpu.barrier_wait(kv_full.at[wg])

            def attend(i, query_tile, dk_acc, dv_acc):
                slot, d_out_tile = q_ring.slot(i), d_out_ring.tile(i)

                def column(x):  # loaded where it is used
                    return spread(vector(x.at[slot], COL), _SQUARE, 1)

                def products(s_acc, dp_acc):
                    set_accumulator(dp_acc, -column(delta_smem), options)
                    plgpu.wgmma(s_acc, k_tile, q_ring.tile(i).T)
                    plgpu.wgmma(dp_acc, v_tile, d_out_tile.T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p = jnp.exp2(s * factor - column(lse_smem))

                    def masked():
                        lo, hi = (vector(x.at[slot], COL) for x in (lo_smem, hi_smem))
                        return jnp.where(inside(_SQUARE, key_base, lo, hi, keys_axis=0), p, 0.0)

                    seen_whole = (query_tile >= whole) & (query_tile < whole_end)
                    return lax.cond(seen_whole, lambda: p, masked), dp_acc[...]

                p, dp = pl.run_scoped(products, *[plgpu.ACC(_SQUARE, jnp.float32)] * 2)
                multiply_add(dv_acc, p.astype(q.dtype), d_out_tile, staging)
                multiply_add(dk_acc, (p * dp).astype(q.dtype), q_ring.tile(i), staging)
                plgpu.wgmma_wait(0)

            def accumulate(dk_acc, dv_acc):
                @pl.loop(0, steps)
                def _step(i):
                    query_tile, _ = place(i)
                    q_ring.wait(i)
                    d_out_ring.wait(i)
                    see = (query_tile >= mine) & (query_tile < mine_end)
                    pl.when(see)(lambda: attend(i, query_tile, dk_acc, dv_acc))
                    d_out_ring.release(i)
                    q_ring.release(i)

                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(accumulate, *[plgpu.ACC((HALF, d), jnp.float32)] * 2)
            k_tile[...] = (dk * options.scale).astype(k.dtype)
            v_tile[...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            out_tile = jnp.where(in_context, part * context_tiles + tile, item)
            keys = pl.ds(out_tile * TILE + wg * HALF, HALF)
            plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[row, keys, kv_head])
            plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[row, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            lo_ref = jnp.where(in_context, 0, 2)  # the interval that can reach this tile

            @pl.loop(0, steps)
            def _step(i):
                query_tile, head = place(i)
                rows, slot = pl.ds(query_tile * HALF, HALF), q_ring.slot(i)
                d_out_ring.fill(i, d_out_ref.at[row, rows, head])
                q_ring.fill(i, q_ref.at[row, rows, head])
                full = q_ring.full.at[slot]
                plgpu.copy_gmem_to_smem(lse_ref.at[row, head, rows], lse_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(delta_ref.at[row, head, rows], delta_smem.at[slot], full)
                for i_ref, x in ((lo_ref, lo_smem), (lo_ref + 1, hi_smem)):
                    plgpu.copy_gmem_to_smem(intervals_ref.at[row, i_ref, rows], x.at[slot], full)

            d_out_ring.drain(steps)
            q_ring.drain(steps)

    num_out = shared * TILE + t
    like_k = jax.ShapeDtypeStruct((r, num_out, kv_heads, d), k.dtype)
    dk, dv = call(
        body,
        out_type=[like_k, like_k],
        scratch=[
            smem(2, HALF, d, dtype=k.dtype),
            smem(2, HALF, d, dtype=v.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            Ring.scratch(stages, HALF, d, dtype=q.dtype, copies=5),
            Ring.scratch(stages, HALF, d, dtype=q.dtype),
            *(plgpu.SMEM((stages, HALF), x) for x in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)),
            *staging_for(HALF, q.dtype, options),
        ],
        grid={"rows": r, "items": num_out // TILE, "heads": kv_heads},
        options=options,
    )(q, k, v, d_out, lse, delta, intervals, key_tiles(intervals, u))

    def joined(x):
        context, block = x[:, : shared * TILE], x[:, shared * TILE :]
        sums = context.reshape(r, parts, -1, *x.shape[2:]).astype(jnp.float32).sum(1)
        return jnp.concatenate([sums.astype(x.dtype), block], axis=1)

    return joined(dk), joined(dv)

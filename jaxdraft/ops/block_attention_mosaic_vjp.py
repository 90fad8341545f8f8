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

from jaxdraft.ops.block_attention_tiles import HALF, TILE, key_tiles, query_tiles
from jaxdraft.ops.mosaic_common import (
    COL,
    LOG2E,
    ROW,
    call,
    copy_to,
    inside,
    load_pipeline,
    load_vectors,
    mask,
    multiply_add,
    smem,
    spread,
    staging_for,
    tile_reader,
)


def backward_q(q, k, v, d_out, lse, delta, intervals, options):
    """The queries' gradient, like q."""
    (r, t, heads, d), kv_heads = q.shape, k.shape[2]
    group, keys, stages = heads // kv_heads, options.tuning.dq_keys, options.tuning.dq_stages
    factor = options.scale * LOG2E
    shape = (HALF, keys)

    def body(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, intervals_ref, table_ref, dq_ref, *scratch):
        q_smem, d_out_smem, k_smem, v_smem, q_full, kv_full, k_free, v_free, *staging = scratch
        row, head, wg = (lax.axis_index(x) for x in ("rows", "heads", "wg"))
        tile = t // TILE - 1 - lax.axis_index("tiles")
        reader = _, steps, key_tile, _ = tile_reader(table_ref, row, tile)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            queries = pl.ds(tile * TILE + wg * HALF, HALF)
            q_tile, d_out_tile = q_smem.at[wg], d_out_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[wg])
            plgpu.copy_gmem_to_smem(d_out_ref.at[row, queries, head], d_out_tile, q_full.at[wg])
            ranges = load_vectors([intervals_ref.at[row, i, queries] for i in range(4)], ROW)
            lse, delta = load_vectors([x.at[row, head, queries] for x in (lse_ref, delta_ref)], ROW)
            plgpu.barrier_wait(q_full.at[wg])

            def accumulate(dq_acc):
                @pl.loop(0, steps)
                def _step(i):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(kv_full.at[slot])

                    def products(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                        plgpu.wgmma(dp_acc, d_out_tile, v_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        p = jnp.exp2(s * factor - spread(lse, shape, 0))
                        return mask(p, 0.0, i, reader, keys, ranges), dp_acc[...]

                    acc = plgpu.ACC(shape, jnp.float32)
                    p, dp = pl.run_scoped(products, acc, acc)
                    plgpu.barrier_arrive(v_free.at[slot])
                    ds = p * (dp - spread(delta, shape, 0))
                    multiply_add(dq_acc, ds.astype(k.dtype), k_smem.at[slot], staging)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[slot])

                return dq_acc[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((HALF, d), jnp.float32))
            q_tile[...] = (dq * options.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            def source(ref):
                return lambda i: ref.at[row, pl.ds(key_tile(i) * keys, keys), lax.div(head, jnp.int32(group))]

            copies = [copy_to(k_smem, source(k_ref), k_free), copy_to(v_smem, source(v_ref), v_free)]
            load_pipeline(steps, stages, copies, [kv_full, kv_full])

    barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
    return call(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=[
            smem(2, HALF, d, dtype=q.dtype),
            smem(2, HALF, d, dtype=q.dtype),
            smem(stages, keys, d, dtype=k.dtype),
            smem(stages, keys, d, dtype=v.dtype),
            barrier(num_barriers=2),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            *staging_for(keys, q.dtype, options),
        ],
        grid=(r, t // TILE, heads),
        options=options,
    )(q, k, v, d_out, lse, delta, intervals, query_tiles(intervals, keys))


def backward_kv(q, k, v, d_out, lse, delta, intervals, options):
    """The gradients of keys and values, like them."""
    (r, t, heads, d), (u, kv_heads) = q.shape, k.shape[1:3]
    group, stages = heads // kv_heads, options.tuning.dkv_stages
    factor = options.scale * LOG2E
    shape = (HALF, HALF)
    context_tiles = (u - t) // TILE

    def body(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, intervals_ref, table_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, q_smem, d_out_smem, lse_smem, delta_smem, lo_smem, hi_smem = scratch[:8]
        kv_full, full, q_free, d_out_free, *staging = scratch[8:]
        row, tile, kv_head, wg = (lax.axis_index(x) for x in ("rows", "tiles", "heads", "wg"))
        first, count, whole, whole_end = (table_ref[row, tile, i] for i in range(4))
        steps = count * group

        def query_tile(i):  # downwards: the thread blocks of all key tiles begin with the same queries
            return first + count - 1 - lax.div(i, jnp.int32(group))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            key_base = tile * TILE + wg * HALF
            keys = pl.ds(key_base, HALF)
            k_tile, v_tile = k_smem.at[wg], v_smem.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_tile, kv_full.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_tile, kv_full.at[wg])
            plgpu.barrier_wait(kv_full.at[wg])

            def accumulate(dk_acc, dv_acc):
                @pl.loop(0, steps)
                def _step(i):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])

                    def column(x):  # loaded where it is used: each takes 16 registers of every thread
                        return plgpu.load(x.at[slot], layout=COL)

                    def weights(s):
                        p = jnp.exp2(s * factor - spread(column(lse_smem), shape, 1))

                        def partly():
                            lo, hi = column(lo_smem), column(hi_smem)
                            return jnp.where(inside(shape, key_base, lo, hi, keys_axis=0), p, 0.0)

                        i_query = query_tile(i)
                        return lax.cond((i_query >= whole) & (i_query < whole_end), lambda: p, partly)

                    acc = plgpu.ACC(shape, jnp.float32)

                    def products(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                        plgpu.wgmma(dp_acc, v_tile, d_out_smem.at[slot].T)
                        p = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
                        return p, dp_acc[...]

                    p, dp = pl.run_scoped(products, acc, acc)
                    multiply_add(dv_acc, p.astype(q.dtype), d_out_smem.at[slot], staging)
                    ds = p * (dp - spread(column(delta_smem), shape, 1))
                    multiply_add(dk_acc, ds.astype(q.dtype), q_smem.at[slot], staging)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_free.at[slot])

                return dk_acc[...], dv_acc[...]

            acc = plgpu.ACC((HALF, d), jnp.float32)
            dk, dv = pl.run_scoped(accumulate, acc, acc)
            k_tile[...] = (dk * options.scale).astype(k.dtype)
            v_tile[...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[row, keys, kv_head])
            plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[row, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            kind = jnp.where(tile < context_tiles, 0, 2)  # the interval that can reach this tile

            def head_and_queries(i):
                head = kv_head * group + lax.rem(i, jnp.int32(group))
                return head, pl.ds(query_tile(i) * HALF, HALF)

            def wide(ref):
                def source(i):
                    head, queries = head_and_queries(i)
                    return ref.at[row, queries, head]

                return source

            def narrow(ref, index=None):
                def source(i):
                    head, queries = head_and_queries(i)
                    return ref.at[row, head if index is None else index, queries]

                return source

            copies = [
                copy_to(q_smem, wide(q_ref), q_free),
                copy_to(d_out_smem, wide(d_out_ref), d_out_free),
                copy_to(lse_smem, narrow(lse_ref)),
                copy_to(delta_smem, narrow(delta_ref)),
                copy_to(lo_smem, narrow(intervals_ref, kind)),
                copy_to(hi_smem, narrow(intervals_ref, kind + 1)),
            ]
            load_pipeline(steps, stages, copies, [full] * 6)

    like_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
    barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
    dk, dv = call(
        body,
        out_type=[like_k, like_k],
        scratch=[
            smem(2, HALF, d, dtype=k.dtype),
            smem(2, HALF, d, dtype=v.dtype),
            smem(stages, HALF, d, dtype=q.dtype),
            smem(stages, HALF, d, dtype=q.dtype),
            *(plgpu.SMEM((stages, HALF), x) for x in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)),
            barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            *staging_for(HALF, q.dtype, options),
        ],
        grid=(r, u // TILE, kv_heads),
        options=options,
    )(q, k, v, d_out, lse, delta, intervals, key_tiles(intervals, u))
    return dk, dv

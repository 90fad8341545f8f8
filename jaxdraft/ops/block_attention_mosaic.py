"""Block attention on Hopper GPUs: flash attention of context interval and own block in one kernel, forward and backward.

Both parts are one attention over one list of keys, [context, zeros to the next multiple of 128, block slots]. A query sees two
intervals of it: its context, and its own block. Three Pallas kernels (Mosaic GPU) walk only over the tiles that the
queries of a tile can see: blocks are in the order of their anchors, so these are few, and most of them are seen whole and
need no mask. The work grows with the length of the intervals, not with context times queries.

Compute: two warpgroups, each 64 queries (or keys) wide; a third one moves tiles to shared memory, `stages` ahead.
Sources: FlashAttention 2 and 3 (arXiv 2307.08691, 2407.08608).

Dim suffixes: r rows, t queries (n·b, padded), u keys, q query heads, k key/value heads, d head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_TILE = 128  # queries (or keys) of a thread block: two warpgroups of 64
_HALF = 64
_LOG2E = math.log2(math.e)
_LOW = -1e30  # a running maximum before any key; finite, so that differences are never NaN

_ROW, _COL = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes and pipeline depths, found by measurement on an H200 (benchmarks/NOTES.md)."""

    forward_keys: int = 128
    forward_stages: int = 2
    dq_keys: int = 64
    dq_stages: int = 2
    dkv_stages: int = 2
    dkv_together: bool = True
    head_splits: int = 2
    """Thread blocks among which the query heads of a key/value head are split in the backward of keys and values."""


def attend(
    q, k_context, v_context, k_block, v_block, start, end, valid, *, causal, scale, tuning=None, interpret=False
):
    """`block_attention` on the kernels; bfloat16 or float16, head_dim a multiple of 64. start [r, n, b], end [r, n]."""
    lists, plan = _key_lists(q, k_context, v_context, k_block, v_block, start, end, valid, causal)
    options = _Options(scale=scale, tuning=tuning or Tuning(), interpret=interpret)
    out = _attention(*lists, plan, options)
    return out[:, : q.shape[1] * q.shape[2]].reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    tuning: Tuning
    interpret: bool


def _pad_to(x, multiple: int, axis: int = 1):
    return jnp.pad(x, [(0, -x.shape[axis] % multiple if i == axis else 0) for i in range(x.ndim)])


def _key_lists(q, k_context, v_context, k_block, v_block, start, end, valid, causal):
    """The flat queries and keys, and the intervals [r, 4, t]: context start and end, block start and end."""
    r, n, b, _, _ = q.shape
    flat = lambda x: x.reshape(r, n * b, *x.shape[3:])  # noqa: E731
    k, v = (
        jnp.concatenate([_pad_to(c, _TILE), _pad_to(flat(x), _TILE)], axis=1)
        for c, x in ((k_context, k_block), (v_context, v_block))
    )
    offset = k_context.shape[1] + -k_context.shape[1] % _TILE
    first = jnp.broadcast_to(offset + b * jnp.arange(n)[:, None], (r, n, b))
    last = first + (1 + jnp.arange(b) if causal else b)
    end = jnp.broadcast_to(jnp.minimum(end, k_context.shape[1])[..., None], (r, n, b))
    none = ~valid[..., None]
    intervals = [jnp.where(none | (end <= start), 0, x) for x in (start, end)] + [
        jnp.where(none, 0, x) for x in (first, last)
    ]
    intervals = _pad_to(jnp.stack([flat(x) for x in intervals], axis=1).astype(jnp.int32), _TILE, axis=2)
    return (_pad_to(flat(q), _TILE), k, v), intervals


# Which tiles a tile sees. All of it is arithmetic on a few thousand integers, the same in every layer.


def _query_tiles(intervals, keys: int):
    """[r, query tiles, 6] int32: first and number of the context key tiles, of the block's, first and end of those seen whole."""
    r, _, t = intervals.shape
    lo0, hi0, lo1, hi1 = jnp.moveaxis(intervals.reshape(r, 4, t // _TILE, _TILE), 1, 0)
    far = jnp.iinfo(jnp.int32).max

    def reach(lo, hi):
        first = jnp.min(jnp.where(hi > lo, lo, far), axis=-1) // keys
        last = (jnp.max(hi, axis=-1) + keys - 1) // keys
        count = jnp.maximum(last - first, 0)
        return [jnp.where(count > 0, first, 0), count]

    whole = [(jnp.max(lo0, axis=-1) + keys - 1) // keys, jnp.min(hi0, axis=-1) // keys]
    return jnp.stack([*reach(lo0, hi0), *reach(lo1, hi1), *whole], axis=-1).astype(jnp.int32)


def _key_tiles(intervals, num_keys: int):
    """[r, key tiles, 4] int32: first and number of the query tiles (64 wide) that see it, first and end of those seeing it whole."""
    r, _, t = intervals.shape
    intervals = intervals.reshape(r, 2, 2, 1, t)
    key = _TILE * jnp.arange(num_keys // _TILE)[:, None]
    lo, hi = intervals[:, :, 0], intervals[:, :, 1]
    sees = jnp.any((lo < key + _TILE) & (hi > key) & (hi > lo), axis=1)  # [r, key tiles, t]
    whole = jnp.any((lo <= key) & (hi >= key + _TILE), axis=1)
    sees, whole = (x.reshape(r, -1, t // _HALF, _HALF) for x in (sees, whole))
    sees, whole = jnp.any(sees, axis=-1), jnp.all(whole, axis=-1)
    tiles = t // _HALF
    index = jnp.arange(tiles)
    first = jnp.where(jnp.any(sees, axis=-1), jnp.argmax(sees, axis=-1), 0)
    end = jnp.max(jnp.where(sees, index + 1, 0), axis=-1)
    run = jnp.where(jnp.any(whole, axis=-1), jnp.argmax(whole, axis=-1), tiles)
    run_end = jnp.min(jnp.where(~whole & (index >= run[..., None]), index, tiles), axis=-1)
    return jnp.stack([first, end - first, run, run_end], axis=-1).astype(jnp.int32)


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
    return _backward_q(*args, options), *_backward_kv(*args, options), None


_attention.defvjp(_attention_forward, _attention_backward)


# What the kernels share.


def _smem(*shape, dtype):
    """Shared memory of tiles [..., rows, columns] in the layout that the tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _call(body, *, out_type, scratch, grid, options):
    """The kernel on `grid` = (rows, tiles, heads), heads fastest, with two computing warpgroups and one that loads."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("rows", "tiles", "heads"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if options.interpret else {}),
    )


def _spread(x, shape, axis: int):
    return lax.broadcast_in_dim(x, shape, [axis])


def _inside(shape, key_base, lo, hi, *, keys_axis: int):
    """Mask of a tile: keys key_base + index within the queries' [lo, hi)."""
    key = key_base + plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA)
    lo, hi = (_spread(x, shape, 1 - keys_axis) for x in (lo, hi))
    return (key >= lo) & (key < hi)


def _load_pipeline(steps, stages: int, copies, barriers):
    """The loading warpgroup: copies of step i into slot i % stages as soon as both computing warpgroups have freed it.

    copies: pairs (copy(step, slot, barrier), free barriers or None); `barriers`: the arrival barriers, one a copy.
    """

    @pl.loop(0, steps)
    def _step(i):
        slot = lax.rem(i, jnp.int32(stages))
        for (copy, free), full in zip(copies, barriers, strict=True):
            if free is not None:
                pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            copy(i, slot, full.at[slot])

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _drain(i):
        for _, free in copies:
            if free is not None:
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])


def _tile_reader(table_ref, row, tile):
    context, num_context, block, num_block, whole, whole_end = (table_ref[row, tile, i] for i in range(6))

    def index(i):
        return jnp.where(i < num_context, context + i, block + i - num_context)

    def is_whole(i):
        return (i < num_context) & (index(i) >= whole) & (index(i) < whole_end)

    return num_context, num_context + num_block, index, is_whole


def _mask(x, masked, i, reader, keys: int, ranges):
    """x [queries, keys] of step i, `masked` where a query does not see a key; nothing to do on tiles seen whole."""
    num_context, _, key_tile, is_whole = reader

    def apply(lo, hi):
        return jnp.where(_inside(x.shape, key_tile(i) * keys, lo, hi, keys_axis=1), x, masked)

    def partly():
        return lax.cond(i < num_context, lambda: apply(*ranges[:2]), lambda: apply(*ranges[2:]))

    return lax.cond(is_whole(i), lambda: x, partly)


def _load_vectors(refs, layout):
    return [plgpu.load(x, layout=layout, optimized=False) for x in refs]


def _forward(q, k, v, intervals, options):
    """(out like q, lse [r, q, t] float32 in base 2; +inf for a query without keys)."""
    (r, t, heads, d), (u, kv_heads) = q.shape, k.shape[1:3]
    group, keys, stages = heads // kv_heads, options.tuning.forward_keys, options.tuning.forward_stages
    factor = options.scale * _LOG2E
    shape = (_HALF, keys)

    def body(
        q_ref, k_ref, v_ref, intervals_ref, table_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, *barriers
    ):
        q_full, k_full, v_full, k_free, v_free, turn, *staging = barriers
        row, head, wg = (lax.axis_index(x) for x in ("rows", "heads", "wg"))
        tile = t // _TILE - 1 - lax.axis_index("tiles")  # the longest intervals first
        reader = _, steps, key_tile, _ = _tile_reader(table_ref, row, tile)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            queries = pl.ds(tile * _TILE + wg * _HALF, _HALF)
            q_tile = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[wg])
            ranges = _load_vectors([intervals_ref.at[row, i, queries] for i in range(4)], _ROW)
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

                s = _mask(s, -jnp.inf, i, reader, keys, ranges)
                new_peak = jnp.maximum(peak, jnp.max(s, axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                p = jnp.exp2(s * factor - _spread(new_peak, shape, 0))
                total = total * shrink + jnp.sum(p, axis=1)
                acc = acc * _spread(shrink, acc.shape, 0)
                p = p.astype(v.dtype)
                acc, total, new_peak, p = lax.optimization_barrier((acc, total, new_peak, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = _add_product(acc, p, v_smem.at[slot], staging)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_peak, total

            peak = plgpu.layout_cast(jnp.full((_HALF,), _LOW, jnp.float32), _ROW)
            total = plgpu.layout_cast(jnp.zeros((_HALF,), jnp.float32), _ROW)
            acc = plgpu.layout_cast(jnp.zeros((_HALF, d), jnp.float32), plgpu.Layout.WGMMA)
            acc, peak, total = lax.fori_loop(0, steps, step, (acc, peak, total))
            pl.when(wg == 0)(take_turns)

            seen = total > 0.0
            safe = jnp.where(seen, total, 1.0)
            q_tile[...] = (acc * _spread(1.0 / safe, acc.shape, 0)).astype(q.dtype)
            lse_smem.at[wg][...] = jnp.where(seen, peak + jnp.log(safe) * _LOG2E, jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, queries, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[row, head, queries])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def copy(ref, smem):
                def at(i, slot, barrier):
                    plgpu.copy_gmem_to_smem(
                        ref.at[row, pl.ds(key_tile(i) * keys, keys), kv_head], smem.at[slot], barrier
                    )

                return at

            _load_pipeline(
                steps, stages, [(copy(k_ref, k_smem), k_free), (copy(v_ref, v_smem), v_free)], [k_full, v_full]
            )

    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    return _call(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((r, heads, t), jnp.float32)],
        scratch=[
            _smem(2, _HALF, d, dtype=q.dtype),
            _smem(stages, keys, d, dtype=k.dtype),
            _smem(stages, keys, d, dtype=v.dtype),
            plgpu.SMEM((2, _HALF), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            barrier(),
            barrier(),
            barrier(num_arrivals=2),
            barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            *_staging(keys, q.dtype, options),
        ],
        grid=(r, t // _TILE, heads),
        options=options,
    )(q, k, v, intervals, _query_tiles(intervals, keys))


def _staging(columns: int, dtype, options):
    """Scratch for `_multiply_add`: none on a GPU; the interpreter multiplies shared memory only."""
    return [_smem(2, _HALF, columns, dtype=dtype)] if options.interpret else []


def _multiply_add(acc_ref, a, b_smem, staging):
    """acc_ref += a @ b of a value `a` in registers."""
    if staging:
        staged = staging[0].at[lax.axis_index("wg")]
        staged[...] = a
        plgpu.commit_smem()
        a = staged
    plgpu.wgmma(acc_ref, a, b_smem)


def _add_product(acc, a, b_smem, staging):
    """acc + a @ b, with the accumulator kept in registers."""
    if not staging:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_smem))(plgpu.ACC.init(acc))

    def product(acc_ref):  # the interpreter has no run_state
        _multiply_add(acc_ref, a, b_smem, staging)
        return acc_ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _backward_q(q, k, v, d_out, lse, delta, intervals, options):
    """The queries' gradient, like q."""
    (r, t, heads, d), kv_heads = q.shape, k.shape[2]
    group, keys, stages = heads // kv_heads, options.tuning.dq_keys, options.tuning.dq_stages
    factor = options.scale * _LOG2E
    shape = (_HALF, keys)

    def body(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, intervals_ref, table_ref, dq_ref, *scratch):
        q_smem, d_out_smem, k_smem, v_smem, q_full, kv_full, k_free, v_free, *staging = scratch
        row, head, wg = (lax.axis_index(x) for x in ("rows", "heads", "wg"))
        tile = t // _TILE - 1 - lax.axis_index("tiles")
        reader = _, steps, key_tile, _ = _tile_reader(table_ref, row, tile)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            queries = pl.ds(tile * _TILE + wg * _HALF, _HALF)
            q_tile, d_out_tile = q_smem.at[wg], d_out_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[wg])
            plgpu.copy_gmem_to_smem(d_out_ref.at[row, queries, head], d_out_tile, q_full.at[wg])
            ranges = _load_vectors([intervals_ref.at[row, i, queries] for i in range(4)], _ROW)
            lse, delta = _load_vectors([x.at[row, head, queries] for x in (lse_ref, delta_ref)], _ROW)
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
                        p = jnp.exp2(s * factor - _spread(lse, shape, 0))
                        return _mask(p, 0.0, i, reader, keys, ranges), dp_acc[...]

                    acc = plgpu.ACC(shape, jnp.float32)
                    p, dp = pl.run_scoped(products, acc, acc)
                    plgpu.barrier_arrive(v_free.at[slot])
                    ds = p * (dp - _spread(delta, shape, 0))
                    _multiply_add(dq_acc, ds.astype(k.dtype), k_smem.at[slot], staging)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[slot])

                return dq_acc[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((_HALF, d), jnp.float32))
            q_tile[...] = (dq * options.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def copy(ref, smem):
                def at(i, slot, barrier):
                    plgpu.copy_gmem_to_smem(
                        ref.at[row, pl.ds(key_tile(i) * keys, keys), kv_head], smem.at[slot], barrier
                    )

                return at

            _load_pipeline(
                steps, stages, [(copy(k_ref, k_smem), k_free), (copy(v_ref, v_smem), v_free)], [kv_full, kv_full]
            )

    barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
    return _call(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=[
            _smem(2, _HALF, d, dtype=q.dtype),
            _smem(2, _HALF, d, dtype=q.dtype),
            _smem(stages, keys, d, dtype=k.dtype),
            _smem(stages, keys, d, dtype=v.dtype),
            barrier(num_barriers=2),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            *_staging(keys, q.dtype, options),
        ],
        grid=(r, t // _TILE, heads),
        options=options,
    )(q, k, v, d_out, lse, delta, intervals, _query_tiles(intervals, keys))


def _backward_kv(q, k, v, d_out, lse, delta, intervals, options):
    """The gradients of keys and values, like them."""
    (r, t, heads, d), (u, kv_heads) = q.shape, k.shape[1:3]
    group, stages = heads // kv_heads, options.tuning.dkv_stages
    splits = math.gcd(options.tuning.head_splits, group)
    part = group // splits  # query heads of one thread block
    factor = options.scale * _LOG2E
    shape = (_HALF, _HALF)
    context_tiles = (u - t) // _TILE

    def body(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, intervals_ref, table_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, q_smem, d_out_smem, lse_smem, delta_smem, lo_smem, hi_smem = scratch[:8]
        kv_full, full, q_free, d_out_free, *staging = scratch[8:]
        row, tile, first_head, wg = (lax.axis_index(x) for x in ("rows", "tiles", "heads", "wg"))
        kv_head, split = lax.div(first_head, jnp.int32(splits)), lax.rem(first_head, jnp.int32(splits))
        first, count, whole, whole_end = (table_ref[row, tile, i] for i in range(4))
        steps = count * part

        def query_tile(i):  # downwards: the thread blocks of all key tiles begin with the same queries
            return first + count - 1 - lax.div(i, jnp.int32(part))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            key_base = tile * _TILE + wg * _HALF
            keys = pl.ds(key_base, _HALF)
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
                        return plgpu.load(x.at[slot], layout=_COL)

                    def weights(s):
                        p = jnp.exp2(s * factor - _spread(column(lse_smem), shape, 1))

                        def partly():
                            lo, hi = column(lo_smem), column(hi_smem)
                            return jnp.where(_inside(shape, key_base, lo, hi, keys_axis=0), p, 0.0)

                        i_query = query_tile(i)
                        return lax.cond((i_query >= whole) & (i_query < whole_end), lambda: p, partly)

                    acc = plgpu.ACC(shape, jnp.float32)
                    if options.tuning.dkv_together:

                        def products(s_acc, dp_acc):
                            plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                            plgpu.wgmma(dp_acc, v_tile, d_out_smem.at[slot].T)
                            p = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
                            return p, dp_acc[...]

                        p, dp = pl.run_scoped(products, acc, acc)
                        _multiply_add(dv_acc, p.astype(q.dtype), d_out_smem.at[slot], staging)
                    else:

                        def scores(s_acc):
                            plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                            return s_acc[...]

                        p = weights(pl.run_scoped(scores, acc))

                        def products(dp_acc):
                            plgpu.wgmma(dp_acc, v_tile, d_out_smem.at[slot].T)
                            _multiply_add(dv_acc, p.astype(q.dtype), d_out_smem.at[slot], staging)
                            return plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)

                        dp = pl.run_scoped(products, acc)
                    ds = p * (dp - _spread(column(delta_smem), shape, 1))
                    _multiply_add(dk_acc, ds.astype(q.dtype), q_smem.at[slot], staging)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_free.at[slot])

                return dk_acc[...], dv_acc[...]

            acc = plgpu.ACC((_HALF, d), jnp.float32)
            dk, dv = pl.run_scoped(accumulate, acc, acc)
            k_tile[...] = (dk * options.scale).astype(k.dtype)
            v_tile[...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[row, split, keys, kv_head])
            plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[row, split, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            kind = jnp.where(tile < context_tiles, 0, 2)  # the interval that can reach this tile

            def head_and_queries(i):
                head = kv_head * group + split * part + lax.rem(i, jnp.int32(part))
                return head, pl.ds(query_tile(i) * _HALF, _HALF)

            def wide(ref, smem):
                def at(i, slot, barrier):
                    head, queries = head_and_queries(i)
                    plgpu.copy_gmem_to_smem(ref.at[row, queries, head], smem.at[slot], barrier)

                return at

            def narrow(ref, smem, which=None):
                def at(i, slot, barrier):
                    head, queries = head_and_queries(i)
                    index = head if which is None else kind + which
                    plgpu.copy_gmem_to_smem(ref.at[row, index, queries], smem.at[slot], barrier)

                return at

            copies = [
                (wide(q_ref, q_smem), q_free),
                (wide(d_out_ref, d_out_smem), d_out_free),
                (narrow(lse_ref, lse_smem), None),
                (narrow(delta_ref, delta_smem), None),
                (narrow(intervals_ref, lo_smem, 0), None),
                (narrow(intervals_ref, hi_smem, 1), None),
            ]
            _load_pipeline(steps, stages, copies, [full] * 6)

    like_k = jax.ShapeDtypeStruct((r, splits, *k.shape[1:]), k.dtype)
    barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
    dk, dv = _call(
        body,
        out_type=[like_k, like_k],
        scratch=[
            _smem(2, _HALF, d, dtype=k.dtype),
            _smem(2, _HALF, d, dtype=v.dtype),
            _smem(stages, _HALF, d, dtype=q.dtype),
            _smem(stages, _HALF, d, dtype=q.dtype),
            *(plgpu.SMEM((stages, _HALF), x) for x in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)),
            barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            barrier(num_barriers=stages),
            barrier(num_barriers=stages),
            *_staging(_HALF, q.dtype, options),
        ],
        grid=(r, u // _TILE, kv_heads * splits),
        options=options,
    )(q, k, v, d_out, lse, delta, intervals, _key_tiles(intervals, u))
    return tuple(jnp.sum(x, axis=1, dtype=jnp.float32).astype(x.dtype) for x in (dk, dv))

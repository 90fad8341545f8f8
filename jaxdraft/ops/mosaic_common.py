"""What the block attention kernels (Pallas, Mosaic GPU) share: the launch, the loading warpgroup, masks, products."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdraft.ops.block_attention_tiles import HALF

LOG2E = math.log2(math.e)
ROW, COL = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile widths and pipeline depths, found by measurement on an H200 (benchmarks/NOTES.md)."""

    forward_keys: int = 128
    forward_stages: int = 2
    dq_keys: int = 64
    dq_stages: int = 2
    dkv_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of the kernels; `interpret` runs them on a CPU."""

    scale: float
    tuning: Tuning
    interpret: bool


def smem(*shape, dtype):
    """Shared memory of tiles [..., rows, columns] in the layout that the tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def call(body, *, out_type, scratch, grid, options):
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


def spread(x, shape, axis: int):
    return lax.broadcast_in_dim(x, shape, [axis])


def inside(shape, key_base, lo, hi, *, keys_axis: int):
    """Mask of a tile: keys key_base + index within the queries' [lo, hi)."""
    key = key_base + plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA)
    lo, hi = (spread(x, shape, 1 - keys_axis) for x in (lo, hi))
    return (key >= lo) & (key < hi)


def copy_to(smem, source, free=None):
    """One of a step's copies, for `load_pipeline`: source(step) into smem's slot, once its `free` barrier is passed."""

    def copy(i, slot, barrier):
        plgpu.copy_gmem_to_smem(source(i), smem.at[slot], barrier)

    return copy, free


def load_pipeline(steps, stages: int, copies, barriers):
    """The loading warpgroup: copies of step i into slot i % stages as soon as both computing warpgroups have freed it.

    copies: what `copy_to` returned; `barriers`: the arrival barriers, one a copy. Copies without a `free` barrier are
    freed together with the others of their slot.
    """
    plgpu.set_max_registers(24, action="decrease")

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


def tile_reader(table_ref, row, tile):
    context, num_context, block, num_block, whole, whole_end = (table_ref[row, tile, i] for i in range(6))

    def index(i):
        return jnp.where(i < num_context, context + i, block + i - num_context)

    def is_whole(i):
        return (i < num_context) & (index(i) >= whole) & (index(i) < whole_end)

    return num_context, num_context + num_block, index, is_whole


def mask(x, masked, i, reader, keys: int, ranges):
    """x [queries, keys] of step i, `masked` where a query does not see a key; nothing to do on tiles seen whole."""
    num_context, _, key_tile, is_whole = reader

    def apply(lo, hi):
        return jnp.where(inside(x.shape, key_tile(i) * keys, lo, hi, keys_axis=1), x, masked)

    def partly():
        return lax.cond(i < num_context, lambda: apply(*ranges[:2]), lambda: apply(*ranges[2:]))

    return lax.cond(is_whole(i), lambda: x, partly)


def load_vectors(refs, layout):
    return [plgpu.load(x, layout=layout, optimized=False) for x in refs]


def staging_for(columns: int, dtype, options):
    """Scratch for `multiply_add`: none on a GPU; the interpreter multiplies shared memory only."""
    return [smem(2, HALF, columns, dtype=dtype)] if options.interpret else []


def multiply_add(acc_ref, a, b_smem, staging):
    """acc_ref += a @ b of a value `a` in registers."""
    if staging:
        staged = staging[0].at[lax.axis_index("wg")]
        staged[...] = a
        plgpu.commit_smem()
        a = staged
    plgpu.wgmma(acc_ref, a, b_smem)


def add_product(acc, a, b_smem, staging):
    """acc + a @ b, with the accumulator kept in registers."""
    if not staging:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_smem))(plgpu.ACC.init(acc))

    def product(acc_ref):  # the interpreter has no run_state
        multiply_add(acc_ref, a, b_smem, staging)
        return acc_ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

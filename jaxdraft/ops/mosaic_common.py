"""What the block attention kernels (Pallas, Mosaic GPU) share: launch, work lists, rings of tiles, masks, products."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdraft.ops.block_attention_tiles import HALF

LOG2E = math.log2(math.e)
ROW, COL = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Pipeline depths and the split of the work, found by measurement on an H200 (benchmarks/NOTES.md)."""

    thread_blocks: int | None = None  # of the two kernels over queries; None: one for each multiprocessor
    forward_stages: int = 2  # tiles of 128 keys
    dq_key_stages: int = 3  # tiles of 64 keys; those of values are free earlier
    dq_value_stages: int = 2
    dkv_stages: int = 4  # tiles of 64 queries
    dkv_parts: int = 2  # thread blocks a tile of context keys; one alone would outlast all the others


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
    """The kernel on `grid` = {name: size}, the last one fastest: warpgroups ("wg") 0 and 1 compute, 2 loads."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if options.interpret else {}),
    )


def multiprocessors() -> int:
    """Of this process's GPU (132: H100 and H200 with SXM, 114: H100 PCIe); 132 where the kernels are interpreted."""
    return getattr(jax.local_devices()[0], "core_count", None) or 132


class Ring(NamedTuple):
    """Tiles that the loading warpgroup fills one after the other and that both computing warpgroups read.

    The n-th tile of a thread block lies in slot n % stages, once `full`; the readers say when it is `free` again.
    """

    tiles: Any
    full: Any
    free: Any

    @classmethod
    def scratch(cls, stages: int, *tile, dtype, copies: int = 1):
        barrier = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        return cls(smem(stages, *tile, dtype=dtype), barrier, plgpu.Barrier(num_arrivals=2, num_barriers=stages))

    def slot(self, n):
        return lax.rem(n, jnp.int32(self.tiles.shape[0]))

    def tile(self, n):
        return self.tiles.at[self.slot(n)]

    def wait(self, n):
        plgpu.barrier_wait(self.full.at[self.slot(n)])

    def release(self, n):
        plgpu.barrier_arrive(self.free.at[self.slot(n)])

    def reserve(self, n):
        """The n-th tile's barrier for copies into it, as soon as its slot is free."""
        pl.when(n >= self.tiles.shape[0])(lambda: plgpu.barrier_wait(self.free.at[self.slot(n)]))
        return self.full.at[self.slot(n)]

    def fill(self, n, source):
        plgpu.copy_gmem_to_smem(source, self.tile(n), self.reserve(n))

    def drain(self, n):
        """Waits until all of n tiles have been read."""

        @pl.loop(jnp.maximum(n - self.tiles.shape[0], 0), n)
        def _wait(i):
            plgpu.barrier_wait(self.free.at[self.slot(i)])


def free_stored(ring, n):
    """Waits until what was put in the place of tile n - 1, and copied out, has left shared memory; frees the place."""

    @pl.when(n > 0)
    def _free():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        ring.release(n - 1)


def visit_tiles(rows: int, tiles: int, heads: int, visit):
    """Walks over this thread block's share of all (row, tile, head): (number of visits, last `done`).

    visit(index, row, tile, head, done) -> done, an integer handed on. The last tiles, whose intervals are the longest,
    come first. Thread blocks are dealt their tiles forwards and backwards in turns, which gives each the same work.
    """
    block, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
    rounds, rest = divmod(rows * tiles * heads, blocks)

    def place(index):
        return index * blocks + jnp.where(lax.rem(index, jnp.int32(2)) == 0, block, blocks - 1 - block)

    def step(index, done):
        item = place(index)
        tile = tiles - 1 - lax.rem(lax.div(item, jnp.int32(heads)), jnp.int32(tiles))
        return visit(index, lax.div(item, jnp.int32(heads * tiles)), tile, lax.rem(item, jnp.int32(heads)), done)

    in_last_round = place(jnp.int32(rounds)) < rows * tiles * heads
    count = rounds + jnp.where(in_last_round, 1, 0).astype(jnp.int32) if rest else jnp.int32(rounds)
    return count, lax.fori_loop(jnp.int32(0), count, step, jnp.int32(0))


def run_warpgroups(wg, walk, compute, load, queries, rings):
    """Both computing warpgroups and the loading one over the tiles of `walk(visit)`, which is `visit_tiles`.

    wg: which of them this is; queries: ring with a tile a visit; rings: those whose tiles `done` counts.
    """

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        count, _ = walk(compute)
        free_stored(queries, count)

    @pl.when(wg == 2)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        count, done = walk(load)
        queries.drain(count)
        for ring in rings:
            ring.drain(done)


def spread(x, shape, axis: int):
    return lax.broadcast_in_dim(x, shape, [axis])


def inside(shape, key_base, lo, hi, *, keys_axis: int):
    """Mask of a tile: keys key_base + index within the queries' [lo, hi)."""
    key = key_base + plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA)
    lo, hi = (spread(x, shape, 1 - keys_axis) for x in (lo, hi))
    return (key >= lo) & (key < hi)


def vector(ref, layout):
    """One number a row (ROW) or column (COL) of a tile; each COL vector takes 16 registers of every thread."""
    return plgpu.load(ref, layout=layout, optimized=False)


def staging_for(columns: int, dtype, options):
    """Scratch for `multiply_add`: none on a GPU; the interpreter multiplies shared memory only."""
    return [smem(2, HALF, columns, dtype=dtype)] if options.interpret else []


def multiply_add(acc_ref, a, b_smem, staging):
    """acc_ref += a @ b of a value `a` in registers, asynchronously."""
    if staging:
        staged = staging[0].at[lax.axis_index("wg"), :, pl.ds(0, a.shape[1])]
        staged[...] = a
        plgpu.commit_smem()
        a = staged
    plgpu.wgmma(acc_ref, a, b_smem)


def set_accumulator(acc_ref, x, options):
    """acc_ref[...] = x, which the interpreter knows by another name."""
    if options.interpret:
        jax.ref.swap(acc_ref, ..., x)
    else:
        acc_ref[...] = x

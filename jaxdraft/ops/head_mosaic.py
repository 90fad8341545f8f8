"""Product with the frozen head and the softmax's numerators in one kernel for Hopper GPUs (Pallas, Mosaic GPU).

Where a tile of logits leaves the tensor cores it is turned into exp(logit - reference) and into the tile's part of each
token's statistics, so logits are never written. The reference must be known before: it is the label's logit, which is
below the maximum by the token's nll. bfloat16 has float32's range, so this costs no precision as long as that is less
than `LARGEST`; the caller looks at the returned maximum.

Two warpgroups multiply, each 64 tokens by a tile of the vocabulary; a third loads tiles into shared memory, across the
border from one tile of logits to the next.

Dim suffixes: t tokens, v vocabulary, h model width, n tiles of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxdraft.ops.mosaic_common import LOG2E, ROW, Ring, multiprocessors, smem, spread, vector

LARGEST = 64.0  # nats, 92 bits: sums of 2^18 such weights, times entries of the head, stay in float32
TOKENS, WIDTH = 128, 64  # of a tile: tokens, and the part of the model width that is multiplied at once
HALF = TOKENS // 2
PART = 64  # columns of the weights that leave a warpgroup at once


@dataclasses.dataclass(frozen=True)
class Tuning:
    thread_blocks: int | None = None  # None: one for each multiprocessor
    stages: int = 4
    columns: int = 256  # of the vocabulary in a tile


def softmax_product(
    hidden: Float[Array, "t h"],
    head: Float[Array, "v h"],
    reference: Float[Array, " t"],
    *,
    with_weights: bool,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "t v"] | None, Float[Array, " t"], Float[Array, " t"], Int[Array, " t"]]:
    """(weights, total, maximum, argmax) of the logits hidden · head.

    weights = exp(logit - reference) in the dtype of `hidden`; total is their float32 sum before that rounding. Without
    `with_weights` they are not written. t is a multiple of 128, h and v of 64, and v is at least 256.
    """
    tuning = tuning or Tuning()
    (t, h), v = hidden.shape, head.shape[0]
    columns, stages = tuning.columns, tuning.stages
    tiles_t, tiles_v, steps = t // TOKENS, pl.cdiv(v, columns), h // WIDTH
    rest = v % columns
    assert (t % TOKENS, h % WIDTH, rest % PART) == (0, 0, 0), (t, h, v)
    assert v >= columns, v

    def body(hidden_ref, head_ref, reference_ref, *refs):
        weights_ref = refs[0] if with_weights else None
        stats_ref, ring, head_tiles, out_smem = refs[with_weights:]
        wg, block, blocks = lax.axis_index("wg"), lax.axis_index("blocks"), lax.axis_size("blocks")
        count = lax.div(tiles_t * tiles_v - block + blocks - 1, jnp.int32(blocks))

        def place(index):
            """First token and number of the tile of the vocabulary; tokens fastest, so that the head is read once."""
            item = block + index * blocks
            return lax.rem(item, jnp.int32(tiles_t)) * TOKENS, lax.div(item, jnp.int32(tiles_t))

        def begin(tile_v):
            """The last tile begins early enough to end with the vocabulary."""
            return jnp.minimum(tile_v * columns, v - columns)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")  # with the loader's 40 all that there are

            @pl.loop(0, count)
            def _tile(index):
                token, tile_v = place(index)
                rows, column = pl.ds(token + wg * HALF, HALF), begin(tile_v)
                reference = vector(reference_ref.at[rows], ROW)

                def product(acc_ref):
                    first = index * steps

                    def multiply(n):
                        ring.wait(n)
                        slot = ring.slot(n)
                        plgpu.wgmma(acc_ref, ring.tiles.at[slot, pl.ds(wg * HALF, HALF)], head_tiles.at[slot].T)

                    multiply(first)

                    @pl.loop(1, steps)
                    def _step(k):
                        multiply(first + k)
                        plgpu.wgmma_wait(1)
                        ring.release(first + k - 1)

                    plgpu.wgmma_wait(0)
                    ring.release(first + steps - 1)
                    return acc_ref[...]

                logits = pl.run_scoped(product, plgpu.ACC((HALF, columns), jnp.float32))
                parts = []
                for i in range(0, columns, PART):
                    # Columns of the tile before shall not count again: there exp(-inf) = 0.
                    shift = reference + jnp.where(column + i < tile_v * columns, jnp.inf, 0.0) if rest else reference
                    parts.append(logits[:, i : i + PART] * LOG2E - spread(shift, (HALF, PART), 0))
                peak = jnp.max(functools.reduce(jnp.maximum, parts), axis=1)
                before_end = None
                for i, x in enumerate(parts):
                    col = column + i * PART + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
                    before = jnp.where(x == spread(peak, x.shape, 0), (v - col).astype(jnp.float32), 0.0)
                    before_end = before if before_end is None else jnp.maximum(before, before_end)
                before_end = jnp.max(before_end, axis=1)
                # The numerators only now and a part at a time: beside all of x they do not fit into the registers.
                parts, peak, before_end = lax.optimization_barrier((parts, peak, before_end))
                total = None
                for i, x in enumerate(parts):
                    weights = jnp.exp2(x)
                    total = weights if total is None else total + weights
                    if with_weights:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        out = out_smem.at[wg, i % 2]
                        out[...] = weights.astype(out.dtype)
                        plgpu.commit_smem()
                        start = column + i * PART

                        @pl.when(start >= tile_v * columns if rest else True)
                        def _store(out=out, start=start):
                            plgpu.copy_smem_to_gmem(out, weights_ref.at[rows, pl.ds(start, PART)])

                for i, statistic in enumerate((jnp.sum(total, axis=1), peak, before_end)):
                    stats_ref.at[i, tile_v, rows][...] = statistic

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _tile(index):
                token, tile_v = place(index)
                rows, column = pl.ds(token, TOKENS), pl.ds(begin(tile_v), columns)

                @pl.loop(0, steps)
                def _step(k):
                    n, part = index * steps + k, pl.ds(k * WIDTH, WIDTH)
                    full = ring.reserve(n)
                    plgpu.copy_gmem_to_smem(hidden_ref.at[rows, part], ring.tile(n), full)
                    plgpu.copy_gmem_to_smem(head_ref.at[column, part], head_tiles.at[ring.slot(n)], full)

            ring.drain(count * steps)

    out = [jax.ShapeDtypeStruct((3, tiles_v, t), jnp.float32)]
    *weights, stats = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((t, v), hidden.dtype)] * with_weights + out,
        scratch_types=[
            Ring.scratch(stages, TOKENS, WIDTH, dtype=hidden.dtype, copies=2),
            smem(stages, columns, WIDTH, dtype=head.dtype),  # in the ring's order, under its barriers
            smem(2, 2, HALF, PART, dtype=hidden.dtype),
        ],
        grid=(min(tuning.thread_blocks or multiprocessors(), tiles_t * tiles_v),),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(hidden, head, (reference * LOG2E).astype(jnp.float32))
    total_nt, peak_nt, before_end_nt = stats
    peak_t = jnp.max(peak_nt, axis=0)
    argmax_t = v - jnp.max(jnp.where(peak_nt == peak_t, before_end_nt, 0.0), axis=0).astype(jnp.int32)
    return weights[0] if weights else None, jnp.sum(total_nt, axis=0), peak_t / LOG2E + reference, argmax_t

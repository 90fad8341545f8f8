"""Log-sum-exp and argmax of rows of logits in one pass: a Pallas kernel (Mosaic GPU) for the frozen head's loss.

XLA needs a pass for the maximum, one for the sum and one for the argmax, each bound by memory or by exp. Here a
warpgroup walks along a row with an online softmax in each of its 1,024 lanes; XLA joins the lanes.

Dim suffixes: t tokens, v vocabulary, l lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

_LANES = 1024
_AHEAD = 4  # loads in flight of one lane
_STRIDE = _LANES * _AHEAD
_LOW = -1e30
_LOG2E = 1.4426950408889634


def lse_and_argmax(
    logits: Float[Array, "t v"], labels: Int[Array, " t"], label_logits: Float[Array, " t"], *, interpret: bool = False
) -> tuple[Float[Array, " t"], Int[Array, " t"]]:
    """(log-sum-exp float32, argmax int32) of each row, its logit at `labels` replaced by the exact one.

    v is a multiple of 8 (rows begin at multiples of 16 bytes) and at least 4,096.
    """
    t, v = logits.shape
    steps = pl.cdiv(v, _STRIDE)
    layout = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=8)

    def body(logits_ref, labels_ref, exact_ref, peak_ref, total_ref, where_ref):
        row = lax.axis_index("rows")
        label, exact = labels_ref[row], exact_ref[row] * _LOG2E
        lane = plgpu.broadcasted_iota(jnp.int32, (_LANES,), 0, layout=layout)

        def splat(x, dtype):
            return plgpu.layout_cast(jnp.full((_LANES,), x, dtype), layout)

        def step(i, carry):
            peak, total, where = carry
            # The last step begins early enough to end with the row; what the step before it saw is masked.
            start = jnp.minimum(i * _STRIDE, v - _STRIDE)
            raw = [
                plgpu.load(logits_ref.at[row, pl.ds(start + j * _LANES, _LANES)], layout=layout, optimized=False)
                for j in range(_AHEAD)
            ]
            xs = []
            new_peak = peak
            for j, x in enumerate(raw):
                column = lane + (start + j * _LANES)
                x = x.astype(jnp.float32) * _LOG2E
                x = jnp.where(column == label, splat(exact, jnp.float32), x)
                x = jnp.where(column >= i * _STRIDE, x, -jnp.inf)
                where = jnp.where(x > new_peak, column, where)
                new_peak = jnp.maximum(new_peak, x)
                xs.append(x)
            total = total * jnp.exp2(peak - new_peak)
            for x in xs:
                total = total + jnp.exp2(x - new_peak)
            return new_peak, total, where

        init = (splat(_LOW, jnp.float32), splat(0.0, jnp.float32), splat(0, jnp.int32))
        peak, total, where = lax.fori_loop(0, steps, step, init)
        peak_ref.at[row][...] = peak
        total_ref.at[row][...] = total
        where_ref.at[row][...] = where

    lanes = jax.ShapeDtypeStruct((t, _LANES), jnp.float32)
    peak_tl, total_tl, where_tl = plgpu.kernel(
        body,
        out_type=[lanes, lanes, jax.ShapeDtypeStruct((t, _LANES), jnp.int32)],
        grid=(t,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(logits, labels.astype(jnp.int32), label_logits.astype(jnp.float32))
    peak_t = jnp.max(peak_tl, axis=-1)
    total_t = jnp.sum(total_tl * jnp.exp2(peak_tl - peak_t[:, None]), axis=-1)
    argmax_t = jnp.min(jnp.where(peak_tl == peak_t[:, None], where_tl, v), axis=-1)
    return (peak_t + jnp.log2(total_t)) / _LOG2E, argmax_t

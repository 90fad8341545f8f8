"""Softmax numerators and statistics of rows of logits in one pass: a Pallas kernel (Mosaic GPU) for the frozen head.

XLA needs one pass each for the maximum, the sum, the argmax and the weights. Here a warpgroup walks along a row once
and writes exp(logit - reference) on its way: the reference is not the row's maximum, which is known only at the end,
but that of the row's beginning. bfloat16 has float32's range, so this costs no precision as long as the weights stay
below 2^64; where the maximum is farther above the reference, the warpgroup walks that row again.

Dim suffixes: t tokens, v vocabulary, l lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxdraft.ops.linear_cross_entropy import NARROW_PEAK

_LANES = 1024
_AHEAD = 8  # vectors of one step; those of the next step are being loaded meanwhile
_STRIDE = _LANES * _AHEAD
_LOG2E = 1.4426950408889634


def softmax_weights(
    logits: Float[Array, "t v"],
    logit_scale: Float[Array, " t"],
    labels: Int[Array, " t"],
    label_logits: Float[Array, " t"],
    *,
    weights_dtype: jnp.dtype | None,
    interpret: bool = False,
) -> tuple[Float[Array, "t v"] | None, Float[Array, " t"], Float[Array, " t"], Int[Array, " t"]]:
    """(weights, scale, log-sum-exp, argmax) of each row of logits · logit_scale, with exact logits at `labels`.

    weights · scale is the softmax but for the label's column, which is 0. v is a multiple of 8 (rows begin at multiples
    of 16 bytes) and at least 8,192. Statistics are float32; without a `weights_dtype` no weights are written.
    """
    t, v = logits.shape
    steps, tail = divmod(v, _STRIDE)
    layout = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=8)
    # Of the row's first maximum, of a maximum that is known, and of any weight: powers of two.
    narrow = weights_dtype is not None and jnp.dtype(weights_dtype).itemsize == 1
    expected, largest = (NARROW_PEAK, 15.0) if narrow else (0.0, 64.0)

    def splat(x, dtype=jnp.float32):
        return plgpu.layout_cast(jnp.full((_LANES,), x, dtype), layout)

    def body(logits_ref, logit_scale_ref, labels_ref, exact_ref, *outputs):
        *weights_ref, reference_ref, total_ref, peak_ref, where_ref = outputs
        row = lax.axis_index("rows")
        label, exact, factor = labels_ref[row], exact_ref[row] * _LOG2E, logit_scale_ref[row] * _LOG2E
        lane = plgpu.broadcasted_iota(jnp.int32, (_LANES,), 0, layout=layout)

        def at(start, j):
            return row, pl.ds(start + j * _LANES, _LANES)

        def load(start):
            return [plgpu.load(logits_ref.at[at(start, j)], layout=layout, optimized=False) for j in range(_AHEAD)]

        def step(start, vectors, carry, reference, *, seen=None):
            """One stride of the row; columns below `seen` were counted before."""
            peak, total, where = carry
            for j, x in enumerate(vectors):
                is_label = lane == splat(label - start - j * _LANES, jnp.int32)
                x = jnp.where(is_label, splat(exact), x.astype(jnp.float32) * splat(factor))
                where = jnp.where(x > peak, splat(start + j * _LANES, jnp.int32), where)
                peak = jnp.maximum(peak, x)
                weight = jnp.exp2(x - splat(reference))
                for ref in weights_ref:
                    ref.at[at(start, j)][...] = jnp.where(is_label, 0.0, weight).astype(ref.dtype)
                if seen is not None:
                    weight = jnp.where(lane >= splat(seen - start - j * _LANES, jnp.int32), weight, 0.0)
                total = total + weight
            return peak, total, where

        # The last stride begins early enough to end with the row.
        last = v - _STRIDE if tail else v

        def walk(reference):
            def one(i, carry):
                vectors, carry = carry
                following = load(jnp.minimum((i + 1) * _STRIDE, v - _STRIDE))
                return following, step(i * _STRIDE, vectors, carry, reference)

            carry = splat(-jnp.inf), splat(0.0), splat(0, jnp.int32)
            vectors, carry = lax.fori_loop(0, steps, one, (load(0), carry))
            return step(last, vectors, carry, reference, seen=steps * _STRIDE) if tail else carry

        first = load(0)
        start = jnp.maximum(first[0], first[1])
        for x in first[2:]:
            start = jnp.maximum(start, x)
        reference = jnp.maximum(jnp.max(start.astype(jnp.float32)) * factor, exact) - expected
        peak, total, where = walk(reference)
        top = jnp.max(peak)
        again = top > reference + largest
        peak, total, where = lax.cond(again, lambda: walk(top - expected), lambda: (peak, total, where))
        reference_ref[row] = jnp.where(again, top - expected, reference)
        total_ref[row] = jnp.sum(total)
        peak_ref.at[row][...] = peak
        where_ref.at[row][...] = where

    def out(dtype, *shape):
        return jax.ShapeDtypeStruct((t, *shape), dtype)

    *weights, reference_t, total_t, peak_tl, where_tl = plgpu.kernel(
        body,
        out_type=([] if weights_dtype is None else [out(weights_dtype, v)])
        + [out(jnp.float32), out(jnp.float32), out(jnp.float32, _LANES), out(jnp.int32, _LANES)],
        grid=(t,),
        grid_names=("rows",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(logits, logit_scale.astype(jnp.float32), labels.astype(jnp.int32), label_logits.astype(jnp.float32))
    column_tl = where_tl + jnp.arange(_LANES)
    argmax_t = jnp.min(jnp.where(peak_tl == jnp.max(peak_tl, axis=-1, keepdims=True), column_tl, v), axis=-1)
    return weights[0] if weights else None, 1.0 / total_t, (reference_t + jnp.log2(total_t)) / _LOG2E, argmax_t

"""Rounding that a compiled program must not lose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(x: Float[Array, "*shape"], dtype: str | jnp.dtype) -> Float[Array, "*shape"]:
    """`x` in its own dtype, with the values that it has after a cast to `dtype`: to the nearest, ties to even.

    Inside jit `x.astype(bfloat16).astype(float32)` is only a request. XLA may compute with more precision than it was
    asked for (`xla_allow_excess_precision`, its default), and on a GPU it removes such a pair of casts and leaves a
    copy. `lax.reduce_precision` is the operation that it may not remove. So a program whose result claims to hold
    rounded values (as exported, as served) rounds with this function. Where a cast only decides in which precision a
    product or an activation is computed, more precision is no mistake: the model's own casts stay `astype`.

    Subnormal numbers stay, and what is too large becomes infinite, as in a cast by `ml_dtypes`.

    Args:
      x: float32, or bfloat16.
      dtype: float32 or bfloat16. A dtype that is not narrower than that of `x` changes nothing.

    Raises:
      ValueError: `dtype` has another range of exponents than float32; there `lax.reduce_precision` would make zeros of
        numbers that a cast makes subnormal.
    """
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if narrow.nexp != wide.nexp:
        raise ValueError(f"dtype={jnp.dtype(dtype).name} cannot be rounded to inside jit; use float32 or bfloat16")
    return jax.lax.reduce_precision(x, exponent_bits=narrow.nexp, mantissa_bits=min(narrow.nmant, wide.nmant))

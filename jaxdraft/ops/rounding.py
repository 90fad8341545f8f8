"""Rounding that a compiled program must not lose, and rounding that it must not add."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

F = TypeVar("F", bound=Callable[..., Any])


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


def whole_products(compute_dtype: str) -> Callable[[F], F]:
    """A decorator for a function under jit: where it computes in float32, its products do, too.

    A GPU's default is to round the inputs of float32 products to 10 bits of mantissa (TF32), which no CPU does. Those
    of bfloat16 have fewer anyway. What the user has set (JAX_DEFAULT_MATMUL_PRECISION) stays.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            if compute_dtype != "float32" or jax.config.jax_default_matmul_precision is not None:
                return function(*args, **kwargs)
            with jax.default_matmul_precision("highest"):
                return function(*args, **kwargs)

        return traced

    return decorate

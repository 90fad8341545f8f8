"""Cross entropy through a frozen LM head, without a [tokens, vocab] array.

The head needs no gradient, so d nll / d hidden = (softmax - onehot) · head is known as soon as a chunk's logits are. It
is computed in the forward pass, and the backward only scales it by each token's cotangent. So one pass over the head
serves any loss whose weights are functions of the returned nll (D-PACE's label probability is exp(-nll)).

Tokens that no loss or metric reads (`needed`) are moved behind the others, and only as many chunks are computed as hold
needed ones: the number is read on the device, so any share of needed tokens is exact, and pays for itself alone.

Dim suffixes: r rows, t tokens (c in a chunk), h model width, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdraft.ops.hopper import on_one_hopper

NARROW_PEAK = 8  # log2 of the largest softmax weight in 8 bits: float8_e5m2 holds 2^-16 to 2^15
LOGIT_BYTES = 2**29  # logits of one chunk; the softmax weights take as much


class _Options(NamedTuple):
    multiplier: float | None
    softcap: float | None
    chunk_tokens: int
    dtype: jnp.dtype
    head_dtype: str | None


def linear_cross_entropy(
    hidden: Float[Array, "r t h"],
    head: Float[Array, "v h"],
    labels: Int[Array, "r t"],
    needed: Bool[Array, "r t"] | None = None,
    *,
    multiplier: float | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: str | None = None,
    head_dtype: str | None = None,
) -> tuple[Float[Array, "r t"], Int[Array, "r t"]]:
    """Negative log-likelihood of each label and the most likely token.

    Args:
      hidden: final hidden states; rows stay a batch dimension, so that they may be sharded.
      head: frozen LM head; its gradient is not computed (zero).
      labels: token ids below v.
      needed: tokens to compute; the others get nll 0, predicted 0 and no gradient. None: all.
      multiplier, softcap: logits become softcap·tanh(multiplier·logits / softcap); None leaves either out.
      chunk_tokens: tokens a row of one chunk; None chooses by memory.
      logits_dtype: storage of the logits between passes; None: that of `hidden`. The label's own logit is always
        float32, so that in bfloat16 the nll and the gradient of a confident label keep float32's resolution.
      head_dtype: "float8_e4m3fn" runs both products with the head in 8 bits: the head scaled as a whole, hidden states
        each by its own maximum, the softmax weights as float8_e5m2. The label's logit and its part of the gradient
        stay as they are. None: all in the dtype of `hidden`.

    Returns:
      (nll float32, predicted int32). Products accumulate, and log-sum-exp and nll are computed, in float32.
      Differentiable in `hidden` only.

    Raises:
      ValueError: unknown head_dtype.
    """
    t = hidden.shape[1]
    dtype = jnp.dtype(logits_dtype or hidden.dtype)
    if head_dtype not in (None, "float8_e4m3fn"):
        raise ValueError(f"head_dtype={head_dtype!r} is unknown; use None or 'float8_e4m3fn'")
    if needed is None:
        needed = jnp.ones(labels.shape, bool)
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGIT_BYTES // (dtype.itemsize * hidden.shape[0] * head.shape[0]))
    # Equal chunks: the padding of the last one is wasted work.
    chunk_tokens = -(-t // -(-t // chunk_tokens))
    return _chunked(hidden, head, labels, needed, _Options(multiplier, softcap, chunk_tokens, dtype, head_dtype))


def reference(hidden, head, labels, *, multiplier: float | None = None, softcap: float | None = None):
    """The same from the full [r, t, v] float32 logits: the definition, for tests."""
    logits = jnp.einsum("rth,vh->rtv", hidden, head, preferred_element_type=jnp.float32)
    logits = _transform(logits, multiplier, softcap)
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - label_logit, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _transform(logits, multiplier, softcap):
    if multiplier is not None:
        logits = logits * multiplier
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, head, labels, needed, options):
    nll, predicted = _compacted(hidden, head, labels, needed, options, with_gradient=False)
    return nll, predicted


def _chunked_forward(hidden, head, labels, needed, options):
    nll, predicted, gradient = _compacted(hidden, head, labels, needed, options, with_gradient=True)
    return (nll, predicted), gradient


def _chunked_backward(options, gradient, cotangents):
    d_nll, _ = cotangents  # `predicted` is an integer
    return (d_nll[..., None] * gradient).astype(gradient.dtype), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _compacted(hidden, head, labels, needed, options, *, with_gradient: bool):
    """(nll, predicted and, where asked for, d nll / d hidden), zero for tokens that are not needed."""
    t, chunk_tokens = hidden.shape[1], options.chunk_tokens
    padding = ((0, 0), (0, -t % chunk_tokens))
    needed = jnp.pad(needed, padding)
    order = jnp.argsort(~needed, axis=1, stable=True)  # the needed ones first
    place = jnp.cumsum(needed, axis=1) - 1  # of a needed token in that order
    hidden, labels = (_take(jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)), order) for x in (hidden, labels))
    product = _narrow_products(head) if options.head_dtype else _products(head)

    def chunk(i, results):
        part = [jax.lax.dynamic_slice_in_dim(x, i * chunk_tokens, chunk_tokens, axis=1) for x in (hidden, labels)]
        computed = _chunk(*part, head, product, options, with_gradient=with_gradient)
        return [
            jax.lax.dynamic_update_slice_in_dim(whole, x, i * chunk_tokens, axis=1)
            for whole, x in zip(results, computed, strict=True)
        ]

    results = [jnp.zeros(labels.shape, jnp.float32), jnp.zeros(labels.shape, jnp.int32)]
    results += [jnp.zeros_like(hidden)] * with_gradient
    chunks = -(-jnp.max(jnp.sum(needed, axis=1)) // chunk_tokens)
    results = jax.lax.fori_loop(0, chunks, chunk, results)
    place, needed = place[:, :t], needed[:, :t]
    return [jnp.where(_like(needed, x), _take(x, place), 0) for x in results]


def _take(x, index):
    return jnp.take_along_axis(x, _like(index, x), axis=1, mode="clip")


def _like(x, other):
    return x.reshape(x.shape + (1,) * (other.ndim - x.ndim))


class _Products(NamedTuple):
    """The two products with the head.

    logits(hidden [r, c, h], dtype) -> (raw [r, c, v], scale [r, c]), logits being raw · scale.
    backward(weights [r, c, v]) -> [r, c, h] float32, of weights in `weights_dtype`.
    """

    logits: Callable
    backward: Callable
    weights_dtype: jnp.dtype


def _products(head) -> _Products:
    def logits(hidden, dtype):
        return jnp.einsum("rch,vh->rcv", hidden, head, preferred_element_type=dtype), None

    def backward(weights):
        return jnp.einsum("rcv,vh->rch", weights, head, preferred_element_type=jnp.float32)

    return _Products(logits, backward, head.dtype)


def _narrow_products(head) -> _Products:
    """In 8 bits; a GPU multiplies these only if both operands lie with the summed index last, hence two copies."""
    narrow_vh, head_scale = _quantise(head, axis=(0, 1))
    narrow_hv = jax.lax.optimization_barrier(narrow_vh.T)

    def logits(hidden, dtype):
        narrow, scale = _quantise(hidden, axis=-1)
        raw = jnp.einsum("rch,vh->rcv", narrow, narrow_vh, preferred_element_type=dtype)
        return raw, (scale * head_scale)[..., 0]

    def backward(weights):
        return head_scale * jnp.einsum("rcv,hv->rch", weights, narrow_hv, preferred_element_type=jnp.float32)

    return _Products(logits, backward, jnp.dtype(jnp.float8_e5m2))


def _quantise(x, axis):
    """(float8_e4m3fn, float32 scale), x being about their product, its largest number the largest of the format."""
    x = x.astype(jnp.float32)
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), jnp.finfo(jnp.float32).tiny * 2**20) / largest
    return (x / scale).astype(jnp.float8_e4m3fn), scale


def _chunk(hidden, labels, head, product: _Products, options: _Options, *, with_gradient: bool):
    """The same of one chunk [r, c, h]. Comparisons instead of gathers and argmax: they fuse, and work on a vocabulary
    split over devices."""
    transform = functools.partial(_transform, multiplier=options.multiplier, softcap=options.softcap)
    slope = functools.partial(_slope, multiplier=options.multiplier, softcap=options.softcap)
    raw, raw_scale = product.logits(hidden, options.dtype)
    head_rch = head[labels]
    exact = transform(jnp.einsum("rch,rch->rc", hidden, head_rch, preferred_element_type=jnp.float32))
    if options.multiplier is None and options.softcap is None and softmax_kernel_fits(head.shape[0]):
        from jaxdraft.ops.softmax_mosaic import softmax_weights  # needs a jaxlib with GPU support

        raw_scale = jnp.ones(labels.shape) if raw_scale is None else raw_scale
        flat = raw.reshape(-1, raw.shape[-1]), raw_scale.ravel(), labels.ravel(), exact.ravel()
        outputs = softmax_weights(*flat, weights_dtype=product.weights_dtype if with_gradient else None)
        weights, scale, lse, predicted = (x if x is None else x.reshape(*labels.shape, *x.shape[1:]) for x in outputs)
    else:
        token_ids = jnp.arange(head.shape[0])
        is_label = token_ids == labels[..., None]
        logits = raw.astype(jnp.float32) if raw_scale is None else raw.astype(jnp.float32) * raw_scale[..., None]
        logits = jnp.where(is_label, exact[..., None], transform(logits))
        peak = jnp.max(logits, axis=-1, keepdims=True)
        total = jnp.sum(jnp.exp(logits - peak), axis=-1)
        lse, largest = peak[..., 0] + jnp.log(total), 2.0**NARROW_PEAK if options.head_dtype else 1.0
        scale = 1.0 / (total * largest)
        predicted = jnp.min(jnp.where(logits == peak, token_ids, head.shape[0]), axis=-1).astype(jnp.int32)
        weights = jnp.where(is_label, 0.0, jnp.exp(logits - peak) * slope(logits) * largest)
    nll = lse - exact
    if not with_gradient:
        return nll, predicted
    # The label's own column apart from the others, so that 1 - p keeps its resolution where p is almost 1.
    others = product.backward(weights.astype(product.weights_dtype)) * scale[..., None]
    own = jnp.expm1(-nll) * slope(exact)
    return nll, predicted, (others + own[..., None] * head_rch).astype(hidden.dtype)


def _slope(logits, multiplier, softcap):
    """The derivative of `_transform`, from its result."""
    slope = 1.0 if multiplier is None else multiplier
    return slope if softcap is None else slope * (1.0 - jnp.square(logits / softcap))


def softmax_kernel_fits(vocab_size: int) -> bool:
    return vocab_size % 8 == 0 and vocab_size >= 8192 and on_one_hopper()

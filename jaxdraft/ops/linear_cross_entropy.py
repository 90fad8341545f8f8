"""Cross entropy through a frozen LM head, without a [tokens, vocab] array.

The head needs no gradient, so d nll / d hidden = (softmax - onehot) · head is known as soon as a chunk's logits are. It
is computed in the forward pass, and the backward only scales it by each token's cotangent. So one pass over the head
serves any loss whose weights are functions of the returned nll (D-PACE's label probability is exp(-nll)).

Tokens that no loss or metric reads (`needed`) are moved behind the others, and only as many chunks are computed as hold
needed ones: the number is read on the device, so any share of needed tokens is exact, and pays for itself alone.

On a Hopper GPU the first product is our own kernel (head_mosaic), which never writes the logits. It cannot hold a label
that is improbable beyond float32; if there is one, all is computed once more the other way.

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
FUSED_TILE = 128  # tokens that head_mosaic takes at once
LOGIT_BYTES = 2**29  # logits of one chunk; the softmax weights take as much. Without logits: half of the weights


class _Options(NamedTuple):
    multiplier: float | None
    softcap: float | None
    chunk_tokens: int
    dtype: jnp.dtype
    head_dtype: str | None
    fused: bool = False


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
      logits_dtype: storage of the logits between passes, where they are stored; None: that of `hidden`. The label's own
        logit is always float32, so that in bfloat16 a confident label's nll and gradient keep float32's resolution.
      head_dtype: "float8_e4m3fn" runs both products with the head in 8 bits: the head scaled as a whole, hidden states
        each by its own maximum, the softmax weights as float8_e5m2. The label's logit and its part of the gradient
        stay as they are. None: all in the dtype of `hidden`.

    Returns:
      (nll float32, predicted int32). Products accumulate, and log-sum-exp and nll are computed, in float32.
      Differentiable in `hidden` only. Of equal logits the lowest id is predicted, as engines do, whose logits are
      those of one product in the dtype of `hidden` (SGLang and z-lab: torch.argmax).

    Raises:
      ValueError: unknown head_dtype.
    """
    shape, (v, _) = labels.shape, head.shape
    dtype = jnp.dtype(logits_dtype or hidden.dtype)
    if head_dtype not in (None, "float8_e4m3fn"):
        raise ValueError(f"head_dtype={head_dtype!r} is unknown; use None or 'float8_e4m3fn'")
    if needed is None:
        needed = jnp.ones(shape, bool)
    fused = multiplier is softcap is head_dtype is None and product_kernel_fits(hidden.dtype, *head.shape)
    tile, row_bytes = 1, dtype.itemsize * v * shape[0]
    if fused:  # on one device: rows need not be kept apart
        chunk_tokens = chunk_tokens and chunk_tokens * shape[0]
        hidden, labels, needed = (x.reshape(1, -1, *x.shape[2:]) for x in (hidden, labels, needed))
        tile, row_bytes = FUSED_TILE, v
    t = labels.shape[1]
    if chunk_tokens is None:
        chunk_tokens = LOGIT_BYTES // row_bytes
    # Equal chunks: the padding of the last one is wasted work.
    chunks = -(-t // max(tile, chunk_tokens // tile * tile))
    chunk_tokens = -(-t // (chunks * tile)) * tile
    options = _Options(multiplier, softcap, chunk_tokens, dtype, head_dtype, fused)
    nll, predicted = _chunked(hidden, head, labels, needed, options)
    return nll.reshape(shape), predicted.reshape(shape)


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
    t = hidden.shape[1]
    padding = ((0, 0), (0, -t % options.chunk_tokens))
    needed = jnp.pad(needed, padding)
    order = jnp.argsort(~needed, axis=1, stable=True)  # the needed ones first
    place = jnp.cumsum(needed, axis=1) - 1  # of a needed token in that order
    hidden, labels = (_take(jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)), order) for x in (hidden, labels))
    count = jnp.max(jnp.sum(needed, axis=1))
    empty = [jnp.zeros(labels.shape, jnp.float32), jnp.zeros(labels.shape, jnp.int32)]
    empty += [jnp.zeros_like(hidden)] * with_gradient

    def loop(tokens, compute, empty):
        def chunk(i, results):
            part = [jax.lax.dynamic_slice_in_dim(x, i * tokens, tokens, axis=1) for x in (hidden, labels)]
            computed = compute(*part, head, with_gradient=with_gradient)
            return [
                jax.lax.dynamic_update_slice_in_dim(whole, x, i * tokens, axis=1)
                for whole, x in zip(results, computed, strict=True)
            ]

        return jax.lax.fori_loop(0, -(-count // tokens), chunk, empty)

    def plain(tokens):
        product = _narrow_products(head) if options.head_dtype else _products(head)
        return loop(tokens, functools.partial(_chunk, product=product, options=options), empty)

    if options.fused:
        from jaxdraft.ops.head_mosaic import LARGEST  # needs a jaxlib with GPU support

        rise, *results = loop(options.chunk_tokens, _fused_chunk, [empty[0], *empty])
        too_far = jnp.any((rise > LARGEST) & (jnp.arange(rise.shape[1]) < count))
        results = jax.lax.cond(too_far, lambda: plain(options.chunk_tokens // 2), lambda: results)
    else:
        results = plain(options.chunk_tokens)
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


def _fused_chunk(hidden, labels, head, *, with_gradient: bool):
    """The same of one chunk [1, c, h], after how far the largest logit lies above the label's."""
    from jaxdraft.ops.head_mosaic import softmax_product

    head_rch = head[labels]
    exact = jnp.einsum("rch,rch->rc", hidden, head_rch, preferred_element_type=jnp.float32)
    weights, total, largest, predicted = softmax_product(hidden[0], head, exact[0], with_weights=with_gradient)
    results = largest[None] - exact, jnp.log(total)[None], predicted[None]
    if not with_gradient:
        return results
    # The label's own weight is 1, and a float32 sum keeps what the others are beside it.
    mean = _products(head).backward(weights[None]) / total[None, :, None]
    return *results, (mean - head_rch).astype(hidden.dtype)


def _chunk(hidden, labels, head, *, product: _Products, options: _Options, with_gradient: bool):
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
        nll = lse - exact
    else:
        token_ids = jnp.arange(head.shape[0])
        is_label = token_ids == labels[..., None]
        logits = raw.astype(jnp.float32) if raw_scale is None else raw.astype(jnp.float32) * raw_scale[..., None]
        logits = transform(logits)
        # Among the logits of one product: the label's own, from another one, would break a tie by its rounding.
        highest = logits == jnp.max(logits, axis=-1, keepdims=True)
        predicted = jnp.min(jnp.where(highest, token_ids, head.shape[0]), axis=-1).astype(jnp.int32)
        logits = jnp.where(is_label, exact[..., None], logits)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        total, largest = jnp.sum(jnp.exp(logits - peak), axis=-1), 2.0**NARROW_PEAK if options.head_dtype else 1.0
        # Not log-sum-exp minus logit: beside a large logit a confident label's nll would be rounded away.
        nll = jnp.log(total) - (exact - peak[..., 0])
        scale = 1.0 / (total * largest)
        weights = jnp.where(is_label, 0.0, jnp.exp(logits - peak) * slope(logits) * largest)
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


def product_kernel_fits(dtype, vocab_size: int, width: int) -> bool:
    fits = dtype == jnp.bfloat16 and vocab_size % 64 == 0 and vocab_size >= 8192 and width % 64 == 0
    return fits and on_one_hopper()

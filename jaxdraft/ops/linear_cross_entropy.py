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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdraft.ops.hopper import on_one_hopper

LOGIT_BYTES = 2**30  # logits of one chunk; the softmax weights take as much


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

    Returns:
      (nll float32, predicted int32). Products accumulate, and log-sum-exp and nll are computed, in float32.
      Differentiable in `hidden` only.
    """
    t = hidden.shape[1]
    dtype = jnp.dtype(logits_dtype or hidden.dtype)
    if needed is None:
        needed = jnp.ones(labels.shape, bool)
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGIT_BYTES // (dtype.itemsize * hidden.shape[0] * head.shape[0]))
    # Equal chunks: the padding of the last one is wasted work.
    chunk_tokens = -(-t // -(-t // chunk_tokens))
    return _chunked(hidden, head, labels, needed, multiplier, softcap, chunk_tokens, dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _chunked(hidden, head, labels, needed, *options):
    nll, predicted = _compacted(hidden, head, labels, needed, *options, with_gradient=False)
    return nll, predicted


def _chunked_forward(hidden, head, labels, needed, *options):
    nll, predicted, gradient = _compacted(hidden, head, labels, needed, *options, with_gradient=True)
    return (nll, predicted), gradient


def _chunked_backward(*arguments):
    *_, gradient, (d_nll, _) = arguments  # `predicted` is an integer
    return (d_nll[..., None] * gradient).astype(gradient.dtype), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _compacted(hidden, head, labels, needed, multiplier, softcap, chunk_tokens, dtype, *, with_gradient: bool):
    """(nll, predicted and, where asked for, d nll / d hidden), zero for tokens that are not needed."""
    t = hidden.shape[1]
    padding = ((0, 0), (0, -t % chunk_tokens))
    needed = jnp.pad(needed, padding)
    order = jnp.argsort(~needed, axis=1, stable=True)  # the needed ones first
    place = jnp.cumsum(needed, axis=1) - 1  # of a needed token in that order
    hidden, labels = (_take(jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)), order) for x in (hidden, labels))

    def chunk(i, results):
        part = [jax.lax.dynamic_slice_in_dim(x, i * chunk_tokens, chunk_tokens, axis=1) for x in (hidden, labels)]
        computed = _chunk(*part, head, multiplier, softcap, dtype, with_gradient=with_gradient)
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


def _chunk(hidden, labels, head, multiplier, softcap, dtype, *, with_gradient: bool):
    """The same of one chunk [r, c, h]. Comparisons instead of gathers and argmax: they fuse, and work on a vocabulary
    split over devices."""
    raw = jnp.einsum("rch,vh->rcv", hidden, head, preferred_element_type=dtype)
    head_rch = head[labels]
    exact = _transform(
        jnp.einsum("rch,rch->rc", hidden, head_rch, preferred_element_type=jnp.float32), multiplier, softcap
    )
    if multiplier is None and softcap is None and softmax_kernel_fits(head.shape[0]):
        from jaxdraft.ops.softmax_mosaic import softmax_weights  # needs a jaxlib with GPU support

        flat = raw.reshape(-1, raw.shape[-1]), labels.reshape(-1), exact.reshape(-1)
        outputs = softmax_weights(*flat, with_weights=with_gradient)
        weights, scale, lse, predicted = (x if x is None else x.reshape(*labels.shape, *x.shape[1:]) for x in outputs)
    else:
        token_ids = jnp.arange(head.shape[0])
        is_label = token_ids == labels[..., None]
        logits = jnp.where(is_label, exact[..., None], _transform(raw.astype(jnp.float32), multiplier, softcap))
        peak = jnp.max(logits, axis=-1, keepdims=True)
        total = jnp.sum(jnp.exp(logits - peak), axis=-1)
        lse, scale = peak[..., 0] + jnp.log(total), 1.0 / total
        predicted = jnp.min(jnp.where(logits == peak, token_ids, head.shape[0]), axis=-1).astype(jnp.int32)
        weights = jnp.where(is_label, 0.0, jnp.exp(logits - peak) * _slope(logits, multiplier, softcap))
    nll = lse - exact
    if not with_gradient:
        return nll, predicted
    # The label's own column apart from the others, so that 1 - p keeps its resolution where p is almost 1.
    others = jnp.einsum("rcv,vh->rch", weights.astype(head.dtype), head, preferred_element_type=jnp.float32)
    own = jnp.expm1(-nll) * _slope(exact, multiplier, softcap)
    return nll, predicted, (others * scale[..., None] + own[..., None] * head_rch).astype(hidden.dtype)


def _slope(logits, multiplier, softcap):
    """The derivative of `_transform`, from its result."""
    slope = 1.0 if multiplier is None else multiplier
    return slope if softcap is None else slope * (1.0 - jnp.square(logits / softcap))


def softmax_kernel_fits(vocab_size: int) -> bool:
    return vocab_size % 8 == 0 and vocab_size >= 8192 and on_one_hopper()

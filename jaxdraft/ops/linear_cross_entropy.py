"""Cross entropy through a frozen LM head, without a [tokens, vocab] array.

The head needs no gradient, so d nll / d hidden = (softmax - onehot) · head is known as soon as a chunk's logits are. It
is computed in the forward pass, and the backward only scales it by each token's cotangent. So one pass over the head
serves any loss whose weights are functions of the returned nll (D-PACE's label probability is exp(-nll)).

Dim suffixes: r rows, t tokens (c in a chunk), h model width, v vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdraft.ops.hopper import on_one_hopper

_LOGIT_BYTES = 2**30  # logits of one chunk


def linear_cross_entropy(
    hidden: Float[Array, "r t h"],
    head: Float[Array, "v h"],
    labels: Int[Array, "r t"],
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
    if chunk_tokens is None:
        chunk_tokens = max(1, _LOGIT_BYTES // (dtype.itemsize * hidden.shape[0] * head.shape[0]))
    # Equal chunks: the padding of the last one is wasted work.
    chunk_tokens = -(-t // -(-t // chunk_tokens))
    return _chunked(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _chunked(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype):
    nll, predicted, _ = _scan(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype, with_gradient=False)
    return nll, predicted


def _chunked_forward(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype):
    nll, predicted, gradient = _scan(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype, with_gradient=True)
    return (nll, predicted), gradient


def _chunked_backward(multiplier, softcap, chunk_tokens, dtype, gradient, cotangents):
    d_nll, _ = cotangents  # `predicted` is an integer
    return (d_nll[..., None] * gradient).astype(gradient.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _statistics_kernel(raw, labels, label_logits):
    from jaxdraft.ops import logit_statistics_mosaic  # needs a jaxlib with GPU support

    flat = raw.reshape(-1, raw.shape[-1]), labels.reshape(-1), label_logits.reshape(-1)
    return tuple(x.reshape(labels.shape) for x in logit_statistics_mosaic.lse_and_argmax(*flat))


def _scan(hidden, head, labels, multiplier, softcap, chunk_tokens, dtype, *, with_gradient: bool):
    r, t, h = hidden.shape
    token_ids = jnp.arange(head.shape[0])
    plain = multiplier is None and softcap is None
    kernel = plain and head.shape[0] % 8 == 0 and head.shape[0] >= 4096 and on_one_hopper()

    def chunk(_, x):
        hidden_rch, labels_rc = x
        raw = jnp.einsum("rch,vh->rcv", hidden_rch, head, preferred_element_type=dtype)
        logits = _transform(raw.astype(jnp.float32), multiplier, softcap)
        # Comparisons instead of gathers and argmax: they fuse, and work on a vocabulary split over devices.
        is_label = token_ids == labels_rc[..., None]
        if dtype.itemsize < 4:
            exact = jnp.einsum("rch,rch->rc", hidden_rch, head[labels_rc], preferred_element_type=jnp.float32)
            label_logits = _transform(exact, multiplier, softcap)
            logits = jnp.where(is_label, label_logits[..., None], logits)
        else:
            label_logits = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        if kernel:
            lse, predicted = _statistics_kernel(raw, labels_rc, label_logits)
        else:
            peak = jnp.max(logits, axis=-1, keepdims=True)
            lse = peak[..., 0] + jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1))
            predicted = jnp.min(jnp.where(logits == peak, token_ids, head.shape[0]), axis=-1).astype(jnp.int32)
        nll = lse - label_logits
        if not with_gradient:
            return None, (nll, predicted, None)
        d_logits = jnp.exp(logits - lse[..., None]) - is_label
        if softcap is not None:
            d_logits = d_logits * (1.0 - jnp.square(logits / softcap))
        if multiplier is not None:
            d_logits = d_logits * multiplier
        gradient = jnp.einsum("rcv,vh->rch", d_logits.astype(head.dtype), head, preferred_element_type=jnp.float32)
        return None, (nll, predicted, gradient.astype(hidden.dtype))

    padding = -t % chunk_tokens
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(r, -1, chunk_tokens, h)
    labels = jnp.pad(labels, ((0, 0), (0, padding))).reshape(r, -1, chunk_tokens)
    _, outputs = jax.lax.scan(chunk, None, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(labels, 1, 0)))

    def rejoin(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(r, t + padding, *x.shape[3:])[:, :t]

    return jax.tree.map(rejoin, outputs)

"""What the draft leaves out changes nothing: MASK's repeated slots before positions, slot 0 after attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_helpers import SLIDING, packed_batch, random_frozen, random_params

from jaxdraft.model.dflash import bind, block_input_embeddings, init_params


@functools.cache
def outputs(filled: bool, predicted_only: bool):
    """(hidden states of slots 1.., gradient of a random sum of them)."""
    batch, frozen = packed_batch(SLIDING, 40, ((40,), (11, 20)), 3), random_frozen(SLIDING, 3)
    anchors = jnp.asarray([[2, 9, 30, 0], [1, 14, 22, 27]])
    valid = jnp.asarray([[True, True, True, False], [True] * 4])
    embeddings = block_input_embeddings(frozen.embedding, batch.tokens, anchors, valid, SLIDING)
    if filled:
        rest = jnp.repeat(embeddings[:, :, 1:], SLIDING.block_size - 1, axis=2)
        embeddings = jnp.concatenate([embeddings[:, :, :1], rest], axis=2)

    @jax.jit
    def run(params):
        model = bind(SLIDING, params, jnp.float32)
        places = {"anchors": anchors, "valid": valid, "segment_start": batch.segment_start}
        hidden = model(embeddings, model.context(batch.features), **places, predicted_only=predicted_only)
        return hidden if predicted_only else hidden[:, :, 1:]

    hidden, backward = jax.vjp(run, random_params(SLIDING, 3))
    return hidden, backward(jnp.asarray(np.random.default_rng(4).normal(size=hidden.shape), jnp.float32))[0]


@pytest.mark.parametrize(("filled", "predicted_only"), [(False, False), (True, True), (False, True)])
def test_same_hidden_states_and_gradients(filled, predicted_only):
    (hidden, grads), (expected, expected_grads) = outputs(filled, predicted_only), outputs(True, False)
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in expected_grads.items():
        atol = 1e-5 * float(jnp.abs(gradient).max())
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("given", [None, 0.05])
def test_initial_widths(given):
    """Without one width for all, every projection of inputs of unit width gives outputs of unit width."""
    params = init_params(dataclasses.replace(SLIDING, initializer_range=given), jax.random.key(0))
    inputs = {"o_proj": 2}  # dims that its product sums over
    for name, weight in params.items():
        if weight.ndim > 1:
            fan_in = np.prod(weight.shape[: inputs.get(name.rpartition(".")[2], 1)])
            np.testing.assert_allclose(np.std(weight), given or fan_in**-0.5, rtol=0.1, err_msg=name)

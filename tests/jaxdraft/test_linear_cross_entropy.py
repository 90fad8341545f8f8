"""The chunked frozen-head cross entropy against full logits, at sizes that no chunk divides."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdraft.losses import LossConfig, dpace_weights
from jaxdraft.ops import linear_cross_entropy as module
from jaxdraft.ops.linear_cross_entropy import linear_cross_entropy, reference


def random_inputs(seed: int, r: int, t: int, v: int, h: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(r, t, h)), dtype),
        jnp.asarray(rng.normal(size=(v, h)), dtype),
        jnp.asarray(rng.integers(0, v, (r, t)), jnp.int32),
        jnp.asarray(rng.normal(size=(r, t)), jnp.float32),
    )


@functools.partial(
    jax.jit, static_argnames=("function", "multiplier", "softcap", "chunk_tokens", "logits_dtype", "head_dtype")
)
def value_and_gradient(function, hidden, head, labels, weights, **options):
    def loss(hidden):
        nll, predicted = function(hidden, head, labels, **options)
        return jnp.sum(nll * weights), (nll, predicted)

    (_, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
    return outputs, gradient


jitted = jax.jit(linear_cross_entropy, static_argnames=("multiplier", "softcap", "chunk_tokens"))


@pytest.mark.parametrize(
    ("sizes", "chunk_tokens", "scalars"),
    [
        ((1, 1, 3, 2), 64, {}),
        ((2, 13, 101, 8), 4, {"multiplier": 0.7}),
        ((2, 13, 101, 8), None, {"softcap": 3.0}),
        ((3, 7, 33, 5), 1, {"multiplier": 2.0, "softcap": 1.5}),
    ],
)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equals_full_logits(sizes, chunk_tokens, scalars, seed):
    inputs, options = random_inputs(seed, *sizes), {"chunk_tokens": chunk_tokens} | scalars
    (nll, predicted), gradient = value_and_gradient(linear_cross_entropy, *inputs, **options)
    (expected, expected_predicted), expected_gradient = value_and_gradient(reference, *inputs, **scalars)
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predicted, expected_predicted)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    # Without a gradient, another path runs.
    nll, predicted = jitted(*inputs[:3], **options)
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predicted, expected_predicted)


def test_qwen35_vocabulary():
    """V = 248,320 is no multiple of 2,048; the last ids count like the first."""
    hidden, head, labels, weights = random_inputs(0, 1, 5, 248_320, 4)
    labels = labels.at[0, 0].set(248_319).at[0, 1].set(0)
    head = head.at[248_319].set(20 * hidden[0, 2])  # most likely at token 2
    (nll, predicted), gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels, weights, chunk_tokens=2)
    (expected, _), expected_gradient = value_and_gradient(reference, hidden, head, labels, weights)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert int(predicted[0, 2]) == 248_319


def test_weights_may_depend_on_the_label_probability():
    """D-PACE's detached weights from exp(-nll): the gradient is that of fixed weights."""
    hidden, head, labels, _ = random_inputs(1, 1, 15, 31, 6)
    mask, alpha = jnp.ones((1, 3, 5), bool), LossConfig().dpace_alpha

    def loss(hidden):
        nll = linear_cross_entropy(hidden, head, labels)[0].reshape(1, 3, 5)
        return jnp.sum(dpace_weights(nll, mask, "dpace", alpha) * nll)

    fixed = dpace_weights(reference(hidden, head, labels)[0].reshape(1, 3, 5), mask, "dpace", alpha).reshape(1, 15)
    expected, expected_gradient = jax.value_and_grad(lambda h: jnp.sum(fixed * reference(h, head, labels)[0]))(hidden)
    value, gradient = jax.value_and_grad(loss)(hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("logits_dtype", "tolerance"), [("float32", 1e-4), (None, 2**-8 * 30)])
def test_bfloat16_accumulates_in_float32(logits_dtype, tolerance):
    """Stored in bfloat16, logits (here up to 30) are off by their rounding; float32 ones are exact."""
    inputs = random_inputs(2, 2, 9, 203, 64, jnp.bfloat16)
    options = {"chunk_tokens": 4, "logits_dtype": logits_dtype}
    (nll, _), gradient = value_and_gradient(linear_cross_entropy, *inputs, **options)
    exact = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs)
    (expected, _), expected_gradient = value_and_gradient(reference, *exact)
    assert nll.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=tolerance)
    error = np.linalg.norm(np.asarray(gradient, np.float32) - expected_gradient) / np.linalg.norm(expected_gradient)
    assert error < 2e-2


def test_a_confident_label_keeps_its_resolution_in_bfloat16():
    """nll near 0 beside logits near 100, whose bfloat16 rounding is 0.25."""
    hidden, head, labels, weights = random_inputs(4, 1, 6, 50, 64, jnp.bfloat16)
    labels = jnp.arange(6)[None]
    head = head.at[labels[0]].set(1.6 * hidden[0])
    (nll, predicted), gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels, weights)
    exact = (hidden.astype(jnp.float32), head.astype(jnp.float32), labels, weights)
    (expected, _), expected_gradient = value_and_gradient(reference, *exact)
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected_gradient, atol=1e-4)
    np.testing.assert_array_equal(predicted, labels)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_very_confident_labels_nll_is_not_rounded_to_its_logits(dtype):
    """Against float64; the label's logit is 100 to 300, where float32 has steps of 8e-6 to 3e-5."""
    hidden, head, labels, _ = random_inputs(7, 1, 9, 60, 64, dtype)
    labels = jnp.arange(9)[None]
    head = (0.2 * head).at[labels[0]].set(hidden[0] * jnp.linspace(0.4, 1.2, 9, dtype=dtype)[:, None])
    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden[0], head)]
    logits = wide[0] @ wide[1].T
    own = logits[np.arange(9), np.arange(9)]
    others = np.where(np.eye(9, 60, dtype=bool), -np.inf, logits)
    expected = np.log1p(np.exp(others - own[:, None]).sum(axis=-1))
    with jax.default_matmul_precision("highest"):
        nll, _ = jitted(hidden, head, labels)
    assert expected.max() > 1e-7  # some of it must show
    np.testing.assert_allclose(nll[0], expected, rtol=1e-3 if dtype == jnp.float32 else 1e-1, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scalars", [{}, {"multiplier": 0.7, "softcap": 9.0}])
@pytest.mark.parametrize("vocab", [101, 1000])
def test_of_equal_rows_the_lowest_is_predicted(dtype, scalars, vocab):
    """As torch.argmax does with an engine's logits, whichever of them is the label."""
    import torch

    hidden, head, _, _ = random_inputs(8, 1, 40, vocab, 48, dtype)
    twins = np.stack([np.arange(20), vocab - 1 - np.arange(20)])
    head = head.at[twins[0]].set(hidden[0, :20]).at[twins[1]].set(hidden[0, :20])
    hidden = hidden.at[0, 20:].set(hidden[0, :20])
    labels = jnp.asarray(twins.reshape(1, 40))  # the lower twin, then the higher one
    _, predicted = jitted(hidden, head, labels, **scalars)
    engine = torch.from_numpy(np.array(hidden[0], np.float32)) @ torch.from_numpy(np.array(head, np.float32)).T
    np.testing.assert_array_equal(predicted[0], np.tile(twins[0], 2))
    np.testing.assert_array_equal(predicted[0], torch.argmax(engine, dim=-1).numpy())


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_array_is_larger_than_a_chunk(with_gradient):
    t, v, h, chunk = 1000, 4001, 8, 10
    hidden, head, labels, weights = random_inputs(3, 1, t, v, h)

    def f(hidden):
        return jnp.sum(linear_cross_entropy(hidden, head, labels, chunk_tokens=chunk)[0] * weights)

    compiled = jax.jit(jax.grad(f) if with_gradient else f).lower(hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 4 * chunk * v < 4 * t * v


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_tokens_that_are_not_needed_cost_nothing_and_change_nothing(share, dtype):
    """Any share of needed tokens, rows with different ones: the same numbers; NaN elsewhere is never seen."""
    hidden, head, labels, weights = random_inputs(7, 3, 23, 67, 8, dtype)
    needed = jnp.asarray(np.random.default_rng(8).random(labels.shape) < share).at[1].set(False)
    spoiled = jnp.where(needed[..., None], hidden, jnp.nan)
    weights = weights * needed

    def loss(hidden, needed):
        nll, predicted = linear_cross_entropy(hidden, head, labels, needed, chunk_tokens=5)
        return jnp.sum(nll * weights), (nll, predicted)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (nll, predicted)), gradient = both(spoiled, needed)
    (_, (expected, expected_predicted)), expected_gradient = both(hidden, jnp.ones_like(needed))
    np.testing.assert_array_equal(nll, jnp.where(needed, expected, 0))
    np.testing.assert_array_equal(predicted, jnp.where(needed, expected_predicted, 0))
    np.testing.assert_array_equal(gradient, jnp.where(needed[..., None], expected_gradient, 0))


def test_only_the_chunks_of_needed_tokens_are_computed(monkeypatch):
    monkeypatch.setattr(module, "_chunk", counted := CountedChunks(module._chunk))
    hidden, head, labels, _ = random_inputs(9, 2, 20, 31, 4)
    for count, chunks in ((0, 0), (1, 1), (5, 1), (6, 2), (20, 4)):
        counted.calls = 0
        needed = jnp.zeros(labels.shape, bool).at[1, :count].set(True)
        jax.block_until_ready(
            jax.jit(functools.partial(linear_cross_entropy, chunk_tokens=5))(hidden, head, labels, needed)
        )
        jax.effects_barrier()
        assert counted.calls == chunks


class CountedChunks:
    """`_chunk` that counts how often it runs."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def count(self):
        self.calls += 1

    def __call__(self, *args, **options):
        jax.debug.callback(self.count)
        return self.function(*args, **options)


@pytest.mark.parametrize("scalars", [{}, {"multiplier": 0.5, "softcap": 4.0}])
def test_head_in_8_bits(scalars):
    """Off by the rounding of 8-bit numbers and not more; a confident label stays exact."""

    def error(ours, exact):
        return np.linalg.norm(ours - exact) / np.linalg.norm(exact)

    hidden, head, labels, weights = random_inputs(5, 2, 9, 203, 64)
    for rows in (head / 8, (head / 8).at[labels[0, 0]].set(hidden[0, 0])):
        inputs = hidden, rows, labels, weights
        (nll, _), gradient = value_and_gradient(linear_cross_entropy, *inputs, head_dtype="float8_e4m3fn", **scalars)
        (exact, _), exact_gradient = value_and_gradient(reference, *inputs, **scalars)
        assert 1e-5 < error(nll, exact) < 0.03
        assert 1e-4 < error(gradient, exact_gradient) < 0.06
    if not scalars:
        np.testing.assert_allclose(nll[0, 0], exact[0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="head_dtype='float16' is unknown"):
        linear_cross_entropy(hidden, head, labels, head_dtype="float16")

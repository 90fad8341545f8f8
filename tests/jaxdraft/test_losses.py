"""Labels, weights and sums, against the definitions written out in plain loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from draft_helpers import TINY, packed_batch, samples_of

from jaxdraft.losses import (
    Labels,
    LossConfig,
    accept_lengths,
    block_labels,
    decay_weights,
    dpace_weights,
    loss_sums,
    num_samples,
    sample_end,
)

LENGTHS, ROW_TOKENS = ((12, 9, 3), (29,), (1, 20)), 29


@pytest.fixture(scope="module")
def batch():
    return packed_batch(TINY, ROW_TOKENS, LENGTHS, seed=0, mask_rate=0.7)


def labels_of(batch, anchors, valid, block_size):
    rows = (batch.tokens, batch.loss_mask, batch.segment_start, batch.num_tokens)
    return block_labels(*rows, jnp.asarray(anchors), jnp.asarray(valid), block_size)


def test_labels_never_leave_the_sample(batch):
    rng, block_size = np.random.default_rng(0), 6
    anchors, valid = rng.integers(0, ROW_TOKENS, (3, 40)), rng.random((3, 40)) < 0.8
    labels = labels_of(batch, anchors, valid, block_size)
    ends = {(row, i): end for row, start, end in samples_of(batch) for i in range(start, end)}
    for row, n in np.ndindex(anchors.shape):
        for k in range(1, block_size):
            at = int(anchors[row, n]) + k
            inside = bool(valid[row, n]) and at < ends.get((row, int(anchors[row, n])), 0)
            assert bool(labels.inside[row, n, k - 1]) == inside
            assert bool(labels.supervised[row, n, k - 1]) == (inside and bool(batch.loss_mask[row, at]))
            assert int(labels.tokens[row, n, k - 1]) == (int(batch.tokens[row, at]) if inside else 0)


def test_sample_end_and_number_of_samples(batch):
    ends = np.asarray(sample_end(batch.segment_start, batch.num_tokens))
    for row, start, end in samples_of(batch):
        assert np.all(ends[row, start:end] == end)
    supervised = [bool(np.asarray(batch.loss_mask)[row, a:b].any()) for row, a, b in samples_of(batch)]
    assert float(num_samples(batch.segment_start, batch.loss_mask, batch.num_tokens)) == sum(supervised)
    masked_out = batch.loss_mask.at[0, 12:21].set(0).at[1].set(0)
    expected = sum(bool(np.asarray(masked_out)[row, a:b].any()) for row, a, b in samples_of(batch))
    assert float(num_samples(batch.segment_start, masked_out, batch.num_tokens)) == expected < sum(supervised)


def test_decay():
    np.testing.assert_allclose(decay_weights(4, 7.0), np.exp(-np.arange(4) / 7.0), rtol=1e-6)
    np.testing.assert_array_equal(decay_weights(3, None), np.ones(3))


@pytest.mark.parametrize("kind", ["dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"])
def test_dpace_weights_written_out(kind):
    rng, alpha, slots = np.random.default_rng(1), 0.3, 7
    nll, mask = rng.exponential(size=(2, 3, slots)), rng.random((2, 3, slots)) < 0.7
    got = dpace_weights(jnp.asarray(nll, jnp.float32), jnp.asarray(mask), kind, alpha)
    for block in np.ndindex(2, 3):
        s = [(1 - alpha) * np.exp(-x) + alpha if m else 1.0 for x, m in zip(nll[block], mask[block], strict=True)]
        prefix = [np.prod(s[: k + 1]) for k in range(slots)]
        suffix = [sum(prefix[j] for j in range(k, slots) if mask[block][j]) for k in range(slots)]
        expected = {
            "dpace": suffix,
            "dpace-cumulative-confidence-only": prefix,
            "dpace-continuation-value-only": [a / b for a, b in zip(suffix, prefix, strict=True)],
        }[kind]
        np.testing.assert_allclose(got[block], expected, rtol=1e-5)


@pytest.mark.parametrize("confidence", [0.9, 1e-3, 1e-6])
def test_the_continuations_value_has_no_product_that_underflows(confidence):
    """alpha 0 and labels so improbable that the product of a block's probabilities is no float32; 0.9: that it is."""
    rng = np.random.default_rng(2)
    nll = -np.log(confidence) * rng.uniform(0.5, 1.5, (1, 9, 15))
    mask = rng.random((1, 9, 15)) < 0.9
    s = np.where(mask, np.exp(-nll.astype(np.float32).astype(np.float64)), 1.0)
    prefix = np.cumprod(s, axis=-1)
    expected = np.cumsum((prefix * mask)[..., ::-1], axis=-1)[..., ::-1] / prefix  # in float64
    assert (prefix.min() < np.finfo(np.float32).tiny) == (confidence < 1e-2)
    got = dpace_weights(jnp.asarray(nll, jnp.float32), jnp.asarray(mask), "dpace-continuation-value-only", 0.0)
    np.testing.assert_allclose(got, expected, rtol=3e-6)


def test_sums_and_metrics(batch):
    rng = np.random.default_rng(2)
    anchors, valid = np.sort(rng.integers(0, 20, (3, 30)), axis=1), rng.random((3, 30)) < 0.8
    labels = labels_of(batch, anchors, valid, 4)
    nll = jnp.asarray(rng.exponential(size=labels.tokens.shape), jnp.float32)
    predicted = jnp.where(jnp.asarray(rng.random(labels.tokens.shape)) < 0.6, labels.tokens, -1)
    sums = loss_sums(nll, predicted, labels, jnp.asarray(valid), jnp.float32(5), LossConfig(gamma=4.0))

    weights = np.asarray(labels.supervised) * np.exp(-np.arange(3) / 4.0)
    np.testing.assert_allclose(sums.numerator, np.sum(weights * nll), rtol=1e-5)
    np.testing.assert_allclose(sums.denominator, np.sum(weights), rtol=1e-5)
    hits = np.asarray(labels.supervised & (predicted == labels.tokens))
    np.testing.assert_array_equal(sums.correct, hits.sum((0, 1)))
    full = np.asarray(labels.supervised).all(-1)
    lengths = [next((k for k, hit in enumerate(block) if not hit), 3) for block in hits[full]]
    assert 0 < full.sum() < valid.sum() == float(sums.blocks)
    assert (float(sums.full_blocks), float(sums.accept_len)) == (full.sum(), sum(lengths))
    metrics = sums.metrics()
    np.testing.assert_allclose(metrics["tau"], np.mean(lengths) + 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["accept_len"], np.mean(lengths), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], hits.sum() / np.asarray(labels.supervised).sum(), rtol=1e-6)

    per_sample = loss_sums(nll, predicted, labels, jnp.asarray(valid), jnp.float32(5), LossConfig(kind="dpace"))
    assert float(per_sample.denominator) == 5


@pytest.mark.parametrize(
    ("block_size", "gamma"), [(16, 7), (10, 5), (8, 4), (4, 2), (2, 1), (9, 4.5), (13, 6), (32, 37 / 3)]
)
def test_the_default_decay_is_the_published_one_of_the_block_size(block_size, gamma):
    assert LossConfig().decay(block_size) == pytest.approx(gamma)
    assert LossConfig(gamma=3.0).decay(block_size) == 3.0
    assert LossConfig(gamma=None).decay(block_size) is None


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (8, 4.0)])
def test_the_loss_is_decayed_by_its_own_block_size(block_size, gamma):
    shape = (1, 2, block_size - 1)
    labels = Labels(tokens=jnp.zeros(shape, int), inside=jnp.ones(shape, bool), supervised=jnp.ones(shape, bool))
    nll = jnp.asarray(np.random.default_rng(0).exponential(size=shape), jnp.float32)
    arguments = (nll, labels.tokens, labels, jnp.ones((1, 2), bool), jnp.float32(1))
    sums, explicit = (loss_sums(*arguments, config) for config in (LossConfig(), LossConfig(gamma=gamma)))
    np.testing.assert_array_equal(sums.numerator, explicit.numerator)
    np.testing.assert_allclose(sums.denominator, 2 * np.exp(-np.arange(block_size - 1) / gamma).sum(), rtol=1e-6)


def test_accept_lengths():
    hits = jnp.asarray([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool)
    np.testing.assert_array_equal(accept_lengths(hits), [3, 2, 0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "focal"}, "loss.kind='focal' is unknown"),
        ({"gamma": 0.0}, "loss.gamma=0.0 must be positive; use auto, or None for no decay"),
        ({"dpace_alpha": 1.5}, "loss.dpace_alpha=1.5 must be in"),
    ],
)
def test_impossible_losses_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)

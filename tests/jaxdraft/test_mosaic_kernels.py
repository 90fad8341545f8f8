"""The Hopper kernels, interpreted on a CPU, against plain references: unsorted and empty intervals, padding, GQA.

tests/gpu runs the same cases (`check_...`) where nothing needs to be interpreted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_block_attention import random_inputs

from jaxdraft.ops import block_attention
from jaxdraft.ops.block_attention_tiles import key_lists, key_tiles, query_tiles

interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 lacks loads")


def relative_error(a, b) -> float:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))  # of zeros: 0 for zeros alone


# (rows, context, blocks, slots, query heads, kv heads, head_dim), a window for each slot, causal.
ATTENTION = (
    ((1, 150, 17, 8, 2, 1, 64), False, False),  # 2 query tiles of 128 (the second one mostly padding), shared keys
    ((2, 300, 11, 12, 2, 1, 64), True, True),  # rows; blocks across the border between two warpgroups' queries
    ((1, 60, 9, 2, 2, 2, 64), True, False),  # a head of keys for each of queries; less context than a tile
    ((1, 13, 9, 5, 3, 1, 128), False, True),  # three for one; wide heads
)


@interpreted
@pytest.mark.parametrize(("shape", "per_slot", "causal"), ATTENTION)
def test_attention(shape, per_slot, causal):
    check_attention(shape, per_slot, causal)


@interpreted
def test_attention_of_no_valid_block():
    check_attention_of_no_valid_block()


def check_attention(shape, per_slot, causal, *, interpret=True):
    arrays, intervals = random_inputs(shape, 5, per_slot=per_slot, dtype=jnp.bfloat16)
    start, end, valid = intervals
    start = start if per_slot else jnp.broadcast_to(start[..., None], (*start.shape, shape[3]))
    compare_attention(arrays, start, jnp.where(valid, end, 0), valid, causal, interpret)


def check_attention_of_no_valid_block(*, interpret=True):
    arrays, (start, end, valid) = random_inputs((1, 40, 5, 16, 2, 1, 64), 5, per_slot=True, dtype=jnp.bfloat16)
    compare_attention(arrays, start, jnp.zeros_like(end), jnp.zeros_like(valid), False, interpret)


def compare_attention(arrays, start, end, valid, causal, interpret):
    from jaxdraft.ops.block_attention_mosaic import attend
    from jaxdraft.ops.mosaic_common import Tuning

    tuning = Tuning(thread_blocks=3)  # several tiles each, and not the same number
    scale = arrays[0].shape[-1] ** -0.5
    d_out = jnp.asarray(np.random.default_rng(6).normal(size=arrays[0].shape), jnp.bfloat16)

    def run(function, arrays, d_out, **options):
        out, backward = jax.vjp(
            lambda *x: function(*x, start, end, valid, causal=causal, scale=scale, **options), *arrays
        )
        return out, *backward(d_out)

    ours = run(attend, arrays, d_out, tuning=tuning, interpret=interpret)
    arrays, d_out = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, d_out))
    with jax.default_matmul_precision("highest"):  # a GPU's own default for float32 has as few bits as bfloat16
        expected = run(block_attention.reference, arrays, d_out)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, b) < 6e-3
    invalid = ~np.asarray(valid)
    assert np.all(np.asarray(ours[0])[invalid] == 0)
    assert np.all(np.asarray(ours[1])[invalid] == 0)


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_cover_what_queries_see(seed, keys):
    """No visible pair lies outside the visited tiles, and no tile without a mask holds an invisible pair."""
    arrays, (start, end, valid) = random_inputs((2, 400, 40, 8, 1, 1, 2), seed, per_slot=True)
    end = jnp.sort(end, axis=1) if seed % 2 else end
    (q, k, _), intervals = key_lists(*arrays, jnp.minimum(start, end[..., None]), end, valid, causal=bool(seed // 2))
    lo0, hi0, lo1, hi1 = (np.asarray(intervals)[:, i, :, None] for i in range(4))
    key = np.arange(k.shape[1])
    sees = ((key >= lo0) & (key < hi0)) | ((key >= lo1) & (key < hi1))

    def only(*ranges, unit):
        """Whether a key (or query) lies in one of the ranges of `unit`."""
        return np.any([(key_or_query // unit >= a) & (key_or_query // unit < b) for a, b in ranges], axis=0)

    plans, key_or_query = np.asarray(query_tiles(intervals, keys)), key
    for row, tile in np.ndindex(2, q.shape[1] // 128):
        first, count, block, block_count, *halves = plans[row, tile, :16]
        visited = only((first, first + count), (block, block + block_count), unit=keys)
        for i, (near, near_end, own, own_end, whole, whole_end) in enumerate(np.reshape(halves, (2, 6))):
            mine = sees[row, tile * 128 + 64 * i :][:64]
            computed = only((near, near_end), unit=keys) | only((own, own_end), unit=64)
            assert not np.any(mine[:, ~(visited & computed)])
            assert np.all(mine[:, only((max(whole, near), min(whole_end, near_end)), unit=keys)])
    plans, key_or_query = np.asarray(key_tiles(intervals, k.shape[1])), np.arange(q.shape[1])
    for row, tile in np.ndindex(2, k.shape[1] // 128):
        first, count, *halves = plans[row, tile]
        visited = only((first, first + count), unit=64)
        for i, (near, near_end, whole, whole_end) in enumerate(np.reshape(halves, (2, 4))):
            mine = sees[row, :, tile * 128 + 64 * i :][:, :64]
            assert not np.any(mine[~(visited & only((near, near_end), unit=64))])
            assert np.all(mine[only((whole, whole_end), unit=64)])


@interpreted
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("v", [8192, 9736])
def test_softmax_weights(v, dtype):
    check_softmax_weights(v, dtype)


def check_softmax_weights(v, dtype, *, interpret=True):
    """Labels at both ends; row 4 ends far above what its beginning lets expect, and is walked twice."""
    from jaxdraft.ops.softmax_mosaic import softmax_weights

    rows, rng = jnp.arange(5), np.random.default_rng(v)
    logits = jnp.asarray(5 * rng.normal(size=(5, v)), dtype).at[4, v - 9].set(200.0)
    labels, exact = jnp.asarray([0, 7, v - 1, v - 1, 5]), jnp.asarray([30.0, 1.0, 31.0, -5.0, 2.0])
    factor = jnp.full(5, 2.0)
    weights, scale, lse, argmax = softmax_weights(
        logits / 2, factor, labels, exact, weights_dtype=dtype, interpret=True
    )
    expected = logits.astype(jnp.float32).at[rows, labels].set(exact)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(expected, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(argmax, jnp.argmax(expected, axis=-1))
    others = jax.nn.softmax(expected, axis=-1).at[rows, labels].set(0.0)
    np.testing.assert_allclose(
        weights * scale[:, None], others, rtol=2e-5 if dtype == jnp.float32 else 2**-7, atol=1e-30
    )
    narrow, *statistics = softmax_weights(
        logits / 2, factor, labels, exact, weights_dtype=jnp.float8_e5m2, interpret=True
    )
    np.testing.assert_allclose(statistics[1], lse, rtol=1e-6)
    np.testing.assert_allclose(
        narrow.astype(jnp.float32) * statistics[0][:, None], others, rtol=2**-3, atol=2**-16 * 0.6
    )
    nothing, *statistics = softmax_weights(logits / 2, factor, labels, exact, weights_dtype=None, interpret=interpret)
    assert nothing is None
    np.testing.assert_allclose(statistics[1], lse, rtol=1e-6)


@interpreted
@pytest.mark.parametrize("v", [512, 576])
def test_head_softmax_product(v):
    check_head_softmax_product(v)


def check_head_softmax_product(v, *, interpret=True):
    """On two thread blocks; the last tile of the second vocabulary begins early, to end with it."""
    from jaxdraft.ops.head_mosaic import Tuning, softmax_product

    t, h, rng = 256, 128, np.random.default_rng(v)
    hidden = jnp.asarray(rng.normal(size=(t, h)), jnp.bfloat16)
    head = jnp.asarray(0.3 * rng.normal(size=(v, h)), jnp.bfloat16)
    logits = jnp.einsum("th,vh->tv", hidden, head, preferred_element_type=jnp.float32)
    reference = logits[jnp.arange(t), rng.integers(0, v, t)]
    run = functools.partial(
        softmax_product, hidden, head, reference, tuning=Tuning(thread_blocks=2), interpret=interpret
    )
    weights, total, largest, argmax = run(with_weights=True)
    expected = jnp.exp(logits - reference[:, None])
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_allclose(weights.astype(jnp.float32), expected, rtol=2**-8)
    np.testing.assert_allclose(total, jnp.sum(expected, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(largest, jnp.max(logits, axis=-1), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(argmax, jnp.argmax(logits, axis=-1))
    nothing, *statistics = run(with_weights=False)
    assert nothing is None
    for got, expected in zip(statistics, (total, largest, argmax), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@interpreted
@pytest.mark.parametrize("improbable", [0.0, 400.0])
def test_head_and_loss_without_logits(improbable, monkeypatch):
    """As with stored float32 logits, rows and unneeded tokens included; and where one label is too improbable."""
    from jaxdraft.ops import head_mosaic, linear_cross_entropy

    (r, t, h, v), rng = (2, 150, 64, 576), np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(r, t, h)), jnp.bfloat16)
    head = jnp.asarray(0.5 * rng.normal(size=(v, h)), jnp.bfloat16)
    head = head.at[7].set(0.5 * hidden[0, 3] if improbable else 0.0)
    head = head.at[9].set(-improbable / h * jnp.sign(hidden[0, 3]))  # far below the others for that token
    labels = jnp.asarray(rng.integers(0, v, (r, t)), jnp.int32).at[0, 3].set(9)
    needed, d_nll = jnp.asarray(rng.random((r, t)) < 0.7).at[0, 3].set(True), rng.random((r, t)).astype(np.float32)

    def loss(hidden):
        nll, predicted = linear_cross_entropy.linear_cross_entropy(
            hidden, head, labels, needed, logits_dtype="float32", chunk_tokens=70
        )
        return jnp.sum(nll * d_nll), (nll, predicted)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = run(hidden)
    assert (expected[0][1][0].max() > head_mosaic.LARGEST) == bool(improbable)
    tuning = head_mosaic.Tuning(thread_blocks=2)
    interpreted_product = functools.partial(head_mosaic.softmax_product, tuning=tuning, interpret=True)
    monkeypatch.setattr(head_mosaic, "softmax_product", interpreted_product)
    monkeypatch.setattr(linear_cross_entropy, "product_kernel_fits", lambda *_: True)
    (value, (nll, predicted)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
    np.testing.assert_allclose(nll, expected[0][1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predicted, expected[0][1][1])
    assert relative_error(gradient, expected[1]) < 1e-2


def test_auto_is_plain_xla_without_a_hopper_gpu():
    assert block_attention.attention_choice(jnp.bfloat16, 128) == "xla"

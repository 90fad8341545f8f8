"""Interval block attention against its dense reference, forward and backward, on awkward shapes and masks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdraft.ops import block_attention as module
from jaxdraft.ops.block_attention import IMPLEMENTATIONS, block_attention

# (rows, context, blocks, slots, query heads, kv heads, head_dim): no size divides a chunk or another one.
SHAPES = ((2, 37, 11, 5, 6, 3, 8), (1, 1, 1, 2, 1, 1, 2), (3, 13, 7, 3, 4, 1, 6))


def random_inputs(shape, seed: int, *, per_slot: bool, dtype=jnp.float32):
    r, s, n, b, heads, kv_heads, d = shape
    rng = np.random.default_rng(seed)
    kv = ((r, s, kv_heads, d), (r, n, b, kv_heads, d))
    arrays = [rng.normal(size=x) for x in ((r, n, b, heads, d), kv[0], kv[0], kv[1], kv[1])]
    end = rng.integers(0, s + 1, (r, n))
    start = np.minimum(rng.integers(0, s + 1, (r, n)), end)
    # Edges: nothing visible at the very start, the whole row, one key.
    for i, interval in enumerate(((0, 0), (0, s), (s - 1, s))):
        start[0, i % n], end[0, i % n] = interval
    if per_slot:
        start = np.minimum(start[..., None] + np.arange(b), end[..., None])
    valid = rng.random((r, n)) < 0.7
    intervals = (jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32), jnp.asarray(valid))
    return tuple(jnp.asarray(x, dtype) for x in arrays), intervals


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def output_and_gradients(arrays, intervals, d_out, *, causal, implementation):
    def f(*arrays):
        return block_attention(*arrays, *intervals, causal=causal, scale=0.4, implementation=implementation)

    out, backward = jax.vjp(f, *arrays)
    return out, backward(d_out.astype(out.dtype))


def check(shape, seed, *, per_slot, causal, implementation, dtype=jnp.float32, tolerance=2e-5):
    arrays, intervals = random_inputs(shape, seed, per_slot=per_slot, dtype=dtype)
    d_out = jnp.asarray(np.random.default_rng(seed + 1).normal(size=arrays[0].shape), jnp.float32)
    out, grads = output_and_gradients(arrays, intervals, d_out, causal=causal, implementation=implementation)
    arrays_32 = tuple(x.astype(jnp.float32) for x in arrays)
    expected, expected_grads = output_and_gradients(
        arrays_32, intervals, d_out, causal=causal, implementation="reference"
    )
    invalid = ~np.asarray(intervals[2])
    assert np.all(np.asarray(out)[invalid] == 0)
    assert np.all(np.asarray(grads[0])[invalid] == 0)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv", "dk_block", "dv_block"), (out, *grads), (expected, *expected_grads), strict=True
    ):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance * (1 + float(jnp.abs(b).max())), err_msg=name
        )


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), per_slot=st.booleans())
def test_equals_reference(shape, causal, implementation, seed, per_slot):
    check(shape, seed, per_slot=per_slot, causal=causal, implementation=implementation)


@pytest.mark.parametrize(("anchors", "tile"), [(1, 5), (4, 8), (11, 37), (3, 64)])
def test_chunks_of_anchors_and_tiles_of_keys(monkeypatch, anchors, tile):
    """11 anchors over 37 keys, in chunks and tiles that divide them or not, give the same."""
    monkeypatch.setattr(module, "_sizes", lambda q: (anchors, tile))
    output_and_gradients.clear_cache()
    check(SHAPES[0], 0, per_slot=True, causal=True, implementation="xla")
    check(SHAPES[0], 1, per_slot=False, causal=False, implementation="xla")
    output_and_gradients.clear_cache()


def test_tiles_outside_every_interval_are_never_touched(monkeypatch):
    """NaN keys and values there would show in the output and in the gradients."""
    monkeypatch.setattr(module, "_sizes", lambda q: (4, 8))
    output_and_gradients.clear_cache()
    (q, k, v, *block), (_, _, valid) = random_inputs(SHAPES[0], 3, per_slot=False)
    r, _, n = SHAPES[0][:3]
    k, v = (x.at[:, :8].set(jnp.nan).at[:, 24:].set(jnp.nan) for x in (k, v))
    intervals = (jnp.full((r, n), 8, jnp.int32), jnp.full((r, n), 24, jnp.int32), valid)
    out, grads = output_and_gradients((q, k, v, *block), intervals, q, causal=False, implementation="xla")
    output_and_gradients.clear_cache()
    assert all(np.all(np.isfinite(x)) for x in (out, *grads))


def test_bfloat16():
    check(SHAPES[0], 1, per_slot=False, causal=False, implementation="xla", dtype=jnp.bfloat16, tolerance=2e-2)


def test_large_scores_do_not_overflow():
    arrays, intervals = random_inputs(SHAPES[0], 2, per_slot=False)
    arrays = (arrays[0] * 1e3, arrays[1] * 1e3, *arrays[2:])
    out, grads = output_and_gradients(arrays, intervals, arrays[0], causal=False, implementation="xla")
    expected, _ = output_and_gradients(arrays, intervals, arrays[0], causal=False, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_memory_stays_at_one_chunk_of_scores(monkeypatch):
    """Forward and backward of a long row, compiled: far below the scores of all queries."""
    r, s, n, b, heads, kv_heads, d = 1, 1024, 512, 4, 4, 2, 8
    monkeypatch.setattr(module, "_sizes", lambda q: (32, 128))
    output_and_gradients.clear_cache()
    shape = jax.ShapeDtypeStruct
    q = shape((r, n, b, heads, d), jnp.float32)
    context, block = (shape(x, jnp.float32) for x in ((r, s, kv_heads, d), (r, n, b, kv_heads, d)))
    intervals = (shape((r, n), jnp.int32), shape((r, n), jnp.int32), shape((r, n), bool))
    arrays = (q, context, context, block, block)
    lowered = output_and_gradients.lower(arrays, intervals, q, causal=False, implementation="xla")
    output_and_gradients.clear_cache()
    all_scores = 4 * heads * n * b * s
    assert lowered.compile().memory_analysis().temp_size_in_bytes < all_scores / 3


def test_unknown_implementation_is_refused():
    arrays, intervals = random_inputs(SHAPES[1], 0, per_slot=False)
    with pytest.raises(ValueError, match="attention='flash' is unknown"):
        block_attention(*arrays, *intervals, causal=False, scale=1.0, implementation="flash")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the kernels may run")
def test_kernels_without_a_hopper_gpu_are_refused():
    arrays, intervals = random_inputs(SHAPES[1], 0, per_slot=False)
    with pytest.raises(ValueError, match=r"attention='mosaic' needs a Hopper GPU, but .* CPU; use attention='auto'"):
        block_attention(*arrays, *intervals, causal=False, scale=1.0, implementation="mosaic")

"""The Hopper kernels and the loss against plain references, and the values of a rounding, as a GPU computes them.

The cases are those of the CPU's tests, which interpret the kernels, and of `benchmarks.step`.
"""

from __future__ import annotations

import gpu_runs
import numpy as np
import pytest

pytestmark = pytest.mark.gpu

# No test module is imported before a test runs: all workers collect this file, and one alone needs the GPU for it.


@pytest.fixture(scope="module")
def jax():
    """JAX with a run's settings."""
    from jaxdraft import runtime
    from jaxdraft.gpu_memory import limit_gpu_memory

    limit_gpu_memory(0.08)
    runtime.configure()
    import jax

    assert gpu_runs.REHEARSAL or jax.default_backend() == "gpu"
    return jax


@pytest.fixture(scope="module")
def kernels(jax):
    """The kernels' cases, and whether they have to be interpreted."""
    import test_mosaic_kernels

    from jaxdraft.ops.hopper import why_no_kernels

    interpret = gpu_runs.REHEARSAL and jax.__version_info__ >= (0, 11)
    if (reason := why_no_kernels()) and not interpret:
        pytest.skip(f"the kernels do not run here: {reason}")
    return test_mosaic_kernels, interpret


@pytest.mark.parametrize("case", range(4))
def test_attention(kernels, case):
    cases, interpret = kernels
    assert len(cases.ATTENTION) == 4
    cases.check_attention(*cases.ATTENTION[case], interpret=interpret)


def test_attention_of_no_valid_block(kernels):
    cases, interpret = kernels
    cases.check_attention_of_no_valid_block(interpret=interpret)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("v", [8192, 9736])
def test_softmax_weights(kernels, v, dtype):
    cases, interpret = kernels
    cases.check_softmax_weights(v, dtype, interpret=interpret)


@pytest.mark.parametrize("v", [512, 576])
def test_head_softmax_product(kernels, v):
    cases, interpret = kernels
    cases.check_head_softmax_product(v, interpret=interpret)


def test_attention_and_loss_at_a_drafts_shapes(jax, capsys, note):
    """What "auto" chooses, in bfloat16: on a Hopper GPU the kernels, also inside `shard_map`."""
    from benchmarks.step_checks import check_attention, check_loss
    from jaxdraft.ops.block_attention import attention_choice

    assert gpu_runs.REHEARSAL or attention_choice("bfloat16", 128, alone=True) == "mosaic"
    rng = np.random.default_rng(0)
    check_attention(rng, quick=gpu_runs.REHEARSAL)
    check_loss(rng, quick=gpu_runs.REHEARSAL)
    note(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("head_dtype", "limits"), [(None, (1e-2, 2e-2)), ("float8_e4m3fn", (3e-2, 6e-2))], ids=["bfloat16", "8 bits"]
)
# Of nothing; of 8, which is enough for the kernel of the softmax; of 64, which is enough for that of the product.
@pytest.mark.parametrize("v", [8191, 50_261, 8200, 8256])
def test_loss_of_any_vocabulary(jax, v, head_dtype, limits):
    """nll and its gradient in bfloat16 and in 8 bits, with and without a gradient, tokens that are not needed too."""
    import jax.numpy as jnp
    import test_linear_cross_entropy as cases

    hidden, head, labels, weights = cases.random_inputs(3, 2, 77, v, 64, jnp.bfloat16)
    head = (head / 8).astype(jnp.bfloat16)
    exact = (hidden.astype(jnp.float32), head.astype(jnp.float32), labels, weights)
    with jax.default_matmul_precision("highest"):
        (nll, predicted), gradient = cases.value_and_gradient(cases.reference, *exact)
    (ours, chosen), own = cases.value_and_gradient(
        cases.linear_cross_entropy, hidden, head, labels, weights, head_dtype=head_dtype
    )
    assert error(ours, nll) < limits[0]
    assert error(own, gradient) < limits[1]
    assert np.mean(np.asarray(chosen) == predicted) > 0.8
    again, _ = jax.jit(cases.linear_cross_entropy, static_argnames="head_dtype")(
        hidden, head, labels, head_dtype=head_dtype
    )
    assert error(again, nll) < limits[0]
    needed = jnp.arange(77)[None] % 3 != jnp.arange(2)[:, None]
    some, _ = jax.jit(cases.linear_cross_entropy, static_argnames="head_dtype")(
        jnp.where(needed[..., None], hidden, jnp.nan), head, labels, needed, head_dtype=head_dtype
    )
    assert error(some, jnp.where(needed, nll, 0)) < limits[0]


def error(a, b) -> float:
    a, b = (np.asarray(x, np.float32).ravel() for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))  # NaN where either has one: no limit is above it


def test_a_rounding_has_the_values_of_a_cast(jax):
    """Of all exponents, ties, subnormal and too large numbers, inside jit."""
    import jax.numpy as jnp
    import ml_dtypes
    import test_rounding as cases

    from jaxdraft.ops.rounding import rounded

    x = cases.numbers()
    result = jax.jit(rounded, static_argnums=1)(jnp.asarray(x), "bfloat16")
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    different = np.flatnonzero(cases.bits(result) != cases.bits(expected))
    assert not different.size, [(x[i], float(result[i]), expected[i]) for i in different[:5]]

"""The draft's small parts in the precision of training, against Qwen3's own in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.model.layers import project, rms_norm, rope_table

torchvision_ops.ensure()  # before transformers: its Qwen3 imports torchvision

from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3RMSNorm, Qwen3RotaryEmbedding  # noqa: E402


def test_rms_norm_is_qwen3s_to_the_bit_in_bfloat16():
    """Statistics in float32, rounded before the weight: the other order differs in the last bit of many values."""
    rng, eps = np.random.default_rng(), 1e-6
    x, weight = rng.normal(0, 3, (50, 96)).astype(np.float32), rng.normal(1, 0.3, 96).astype(np.float32)
    theirs = Qwen3RMSNorm(96, eps=eps).to(torch.bfloat16)
    theirs.weight.data.copy_(torch.from_numpy(weight))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).bfloat16()).float().numpy()
    ours = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), eps)
    assert ours.dtype == jnp.bfloat16
    same = np.asarray(ours, np.float32) == expected
    assert same.mean() > 0.999  # a mean summed in another order may round otherwise
    twice = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    twice = twice * jax.lax.rsqrt(jnp.mean(twice**2, axis=-1, keepdims=True) + eps) * jnp.bfloat16(weight)
    assert (np.asarray(twice.astype(jnp.bfloat16), np.float32) == expected).mean() < 0.9  # that the test can tell


@pytest.mark.parametrize("theta", [1e6, 1e7])
def test_rope_is_qwen3s_at_every_position_of_a_long_row(theta):
    """Over the whole head, whatever part of it the target rotates."""
    config = Qwen3Config(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": theta})
    positions = np.array([0, 1, 77, 4095, 32767])
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    ours = rope_table(jnp.asarray(positions), 128, theta)
    for a, b in zip(ours, (cos, sin), strict=True):
        assert a.shape == (5, 128)
        np.testing.assert_allclose(a[:4], b[0, :4], atol=2e-3)
        np.testing.assert_allclose(a[4], b[0, 4], atol=2e-2)  # a float32 angle of 32767 has no more digits


def test_a_masters_gradient_is_not_rounded_to_bfloat16():
    rng = np.random.default_rng()
    x, d_out = (jnp.asarray(rng.normal(size=(1, 9, shape)), jnp.bfloat16) for shape in (24, 16))
    weight = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    out, backward = jax.vjp(lambda x, weight: project("rsh,hm->rsm", x, weight), x, weight)
    d_x, d_weight = backward(d_out)
    assert (out.dtype, d_x.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.einsum("rsh,rsm->hm", np.asarray(x, np.float64), np.asarray(d_out, np.float64))
    np.testing.assert_allclose(d_weight, expected, rtol=1e-4, atol=1e-5)

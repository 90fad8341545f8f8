"""Schedule, AdamW and clipping against torch."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxdraft.optim import OptimConfig, clip_factor, global_norm, learning_rate, make_optimizer


def test_schedule():
    config, total = OptimConfig(learning_rate=2.0, warmup_ratio=0.1), 50
    rates = [float(learning_rate(config, total, jnp.int32(k))) for k in range(total + 1)]
    np.testing.assert_allclose(rates[:6], [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-6)  # never 0; the peak at w - 1 and w
    np.testing.assert_allclose(rates[27], 1 + np.cos(np.pi * 22 / 45), rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 0.0, atol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert float(learning_rate(OptimConfig(warmup_ratio=0.0), 1, jnp.int32(0))) == pytest.approx(6e-4)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_direction_equals_torch_adamw(clip_norm):
    rng, rate = np.random.default_rng(0), 0.01
    config = OptimConfig(weight_decay=0.1, clip_norm=clip_norm, beta1=0.8, beta2=0.95, eps=1e-6)
    params = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    theirs = {name: torch.nn.Parameter(torch.from_numpy(x.copy())) for name, x in params.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=rate, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(config)
    ours = {name: jnp.asarray(x) for name, x in params.items()}
    state = optimizer.init(ours)
    for _ in range(5):
        grads = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
        factor = clip_factor(config, global_norm({name: jnp.asarray(g) for name, g in grads.items()}))
        direction, state = optimizer.update({name: factor * g for name, g in grads.items()}, state, ours)
        ours = optax.apply_updates(ours, {name: -rate * d for name, d in direction.items()})
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grads[name])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        reference.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0 must be positive"),
        ({"warmup_ratio": 1.5}, "optim.warmup_ratio=1.5 must be in"),
        ({"beta2": 1.0}, "optim.beta2=1.0 must be in"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative"),
        ({"clip_norm": 0.0}, "optim.clip_norm=0.0 must be positive"),
    ],
)
def test_impossible_optimizers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)

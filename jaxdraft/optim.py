"""AdamW on float32 masters, clipped by the global norm; linear warm-up, then cosine to 0."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; the defaults are the published recipe."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    warmup_ratio: float = 0.04
    """Share of all steps that warm up linearly, 0 to 1."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on every weight."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive; 6e-4 and 1e-8 are published")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optim.warmup_ratio={self.warmup_ratio} must be in [0, 1]; 0.04 is the published value")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1); use 0.9 and 0.999")
        if not self.weight_decay >= 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay} must not be negative; use 0 for none")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm={self.clip_norm} must be positive; use None for no clipping")


def learning_rate(config: OptimConfig, total_steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
    """Rate of optimizer step `step` (from 0): lr·(step+1)/w in the warm-up, so never 0, then cosine down to 0."""
    warmup = int(config.warmup_ratio * total_steps)
    rising = (step + 1) / max(warmup, 1)
    progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.where(step < warmup, rising, falling)


def global_norm(grads: dict[str, Array]) -> Float[Array, ""]:
    """Norm over all gradients in float32: one reduction of one stacked vector, not recomputed in each consumer."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads.values()]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip_factor(config: OptimConfig, norm: Float[Array, ""]) -> Float[Array, ""]:
    """Multiplies gradients of this global norm so that it does not exceed `clip_norm`."""
    if config.clip_norm is None:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The update direction from clipped gradients, before the learning rate: new = old - learning_rate · direction."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )

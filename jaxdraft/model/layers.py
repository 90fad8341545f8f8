"""Layers of the DFlash draft: RMSNorm, rotary positions, block attention with GQA, SwiGLU.

Dim suffixes: r rows, s context tokens, n blocks, b slots of a block, h model width, q query heads, k key/value heads,
d head_dim, m MLP width. A parameter is a plain array with logical axis names as metadata (`axes`); `jaxdraft.sharding`
maps those names to mesh axes. Parameters are float32 masters; every use casts to the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdraft.ops.block_attention import block_attention
from jaxdraft.sharding import constrain_dims, per_device


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    stddev: float | None,
    dtype,
    *,
    num_input_dims: int = 1,
) -> nnx.Param:
    """A normally initialised projection that carries its logical axis names.

    Args:
      stddev: None: the inverse root of the number of inputs, so that inputs of unit width give outputs of unit width.
      num_input_dims: leading dims of `shape` that a product sums over.
    """
    assert len(shape) == len(axes)
    if stddev is None:
        stddev = math.prod(shape[:num_input_dims]) ** -0.5
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def norm_scale(dim: int, dtype) -> nnx.Param:
    """An RMSNorm weight, all ones, replicated."""
    return nnx.Param(jnp.ones((dim,), dtype), axes=(None,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(subscripts: str, x: Float[Array, "*x"], weight: Float[Array, "*w"]) -> Float[Array, "*out"]:
    """einsum(subscripts, x, weight) in x's dtype; the weight's gradient is computed in the weight's own dtype.

    So a float32 master gets a float32 gradient, not one that was rounded to bfloat16 and widened again.
    """
    return jnp.einsum(subscripts, x, _gathered(subscripts, weight.astype(x.dtype)))


def _gathered(subscripts: str, weight):
    """The weight, whole along h, which fsdp splits. XLA might otherwise move the activations where they are smaller."""
    letters = subscripts.split("->")[0].split(",")[1]
    return constrain_dims(weight, {letters.index("h"): None})


def _project_forward(subscripts, x, weight):
    narrow = _gathered(subscripts, weight.astype(x.dtype))
    return jnp.einsum(subscripts, x, narrow), (x, narrow, jnp.zeros((), weight.dtype))


def _project_backward(subscripts, residuals, d_out):
    x, narrow, like_weight = residuals
    inputs, out = subscripts.split("->")
    a, b = inputs.split(",")
    d_x = jnp.einsum(f"{out},{b}->{a}", d_out, narrow)
    return d_x, jnp.einsum(f"{a},{out}->{b}", x, d_out, preferred_element_type=like_weight.dtype)


project.defvjp(_project_forward, _project_backward)


def rms_norm(x: Float[Array, "*batch h"], weight: Float[Array, " h"], eps: float) -> Float[Array, "*batch h"]:
    """Qwen3's RMSNorm: statistics in float32, cast to the input dtype, and only then the multiply by the weight."""
    x_32 = x.astype(jnp.float32)
    x_32 = x_32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_32), axis=-1, keepdims=True) + eps)
    return x_32.astype(x.dtype) * weight.astype(x.dtype)


def rope_table(
    positions: Int[Array, "*batch"], head_dim: int, theta: float
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """(cos, sin) in float32 of plain 1-D rotary positions, over the whole head_dim (`rotate_half` layout)."""
    frequency_d = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency_d
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "*batch heads d"], table: tuple[Array, Array]) -> Float[Array, "*batch heads d"]:
    """Rotates every head of x by its position; computed in float32, returned in x's dtype."""
    cos, sin = (t[..., None, :] for t in table)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-high, low], axis=-1)
    return (x * cos + rotated * sin).astype(x.dtype)


def fill_slots(x: Float[Array, "r n x *rest"], num_slots: int) -> Float[Array, "r n b *rest"]:
    """Repeats a block's last slot. At the input all slots but 0 are MASK, so all before the rotation is computed once.

    The gradient of the repeated slot is summed in float32.
    """
    if x.shape[2] == num_slots:
        return x
    wide = x.astype(jnp.float32)
    last = jnp.broadcast_to(wide[:, :, -1:], (*x.shape[:2], num_slots - x.shape[2] + 1, *x.shape[3:]))
    return jnp.concatenate([wide[:, :, :-1], last], axis=2).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """What attention must know about the blocks, computed once and shared by all layers.

    Attributes:
      context_rope: (cos, sin) of the context tokens, each [r, s, d] float32.
      block_rope: (cos, sin) of the block slots, each [r, n, b, d] float32.
      start: first visible context index of a block in a full layer, [r, n] int32.
      sliding_start: the same for each slot in a sliding layer, [r, n, b] int32; None without such layers.
      end: one past the last visible context index (the anchor), [r, n] int32.
      valid: whether the block exists, [r, n] bool.
    """

    context_rope: tuple[Array, Array]
    block_rope: tuple[Array, Array]
    start: Int[Array, "r n"]
    sliding_start: Int[Array, "r n b"] | None
    end: Int[Array, "r n"]
    valid: Bool[Array, "r n"]

    @property
    def num_slots(self) -> int:
        return self.block_rope[0].shape[2]


class Attention(nnx.Module):
    """Block attention: queries from the block, keys and values from the target context and the block itself.

    The context enters K and V without `input_layernorm`; q_norm and k_norm act per head before the rotation.
    `context_kv` are the context's projected keys and values. The input may have fewer slots than the block (x <= b):
    its last slot then stands for those that are left out.
    """

    def __init__(self, config, *, sliding: bool, rngs: nnx.Rngs, param_dtype):
        h, q, k, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        std = config.initializer_range
        self.q_proj = parameter(rngs, (h, q, d), ("embed", "heads", None), std, param_dtype)
        self.k_proj = parameter(rngs, (h, k, d), ("embed", "kv_heads", None), std, param_dtype)
        self.v_proj = parameter(rngs, (h, k, d), ("embed", "kv_heads", None), std, param_dtype)
        self.o_proj = parameter(rngs, (q, d, h), ("heads", None, "embed"), std, param_dtype, num_input_dims=2)
        self.q_norm = norm_scale(d, param_dtype)
        self.k_norm = norm_scale(d, param_dtype)
        self.eps, self.sliding = config.rms_norm_eps, sliding
        self.causal = sliding if config.is_causal is None else config.is_causal

    def __call__(
        self,
        x_rnbh: Float[Array, "r n x h"],
        context_kv: tuple[Float[Array, "r s k d"], Float[Array, "r s k d"]],
        geometry: BlockGeometry,
        implementation: str,
    ) -> Float[Array, "r n b h"]:
        q_rnbqd = project("rnbh,hqd->rnbqd", x_rnbh, self.q_proj[...])
        k_rnbkd, v_rnbkd = (project("rnbh,hkd->rnbkd", x_rnbh, w[...]) for w in (self.k_proj, self.v_proj))
        k_rskd, v_rskd = context_kv

        fill = functools.partial(fill_slots, num_slots=geometry.num_slots)
        q_rnbqd = apply_rope(fill(rms_norm(q_rnbqd, self.q_norm[...], self.eps)), geometry.block_rope)
        k_rnbkd = apply_rope(fill(rms_norm(k_rnbkd, self.k_norm[...], self.eps)), geometry.block_rope)
        k_rskd = apply_rope(rms_norm(k_rskd, self.k_norm[...], self.eps), geometry.context_rope)

        attend = functools.partial(
            block_attention, causal=self.causal, scale=q_rnbqd.shape[-1] ** -0.5, implementation=implementation
        )
        queries, context, block = (
            ("rows", None, None, "heads", None),
            ("rows", None, "kv_heads", None),
            ("rows", None, None, "kv_heads", None),
        )
        out_rnbqd = per_device(attend, [queries, context, context, block, block, *[("rows",)] * 3], queries)(
            q_rnbqd,
            k_rskd,
            v_rskd,
            k_rnbkd,
            fill(v_rnbkd),
            geometry.sliding_start if self.sliding else geometry.start,
            geometry.end,
            geometry.valid,
        )
        return project("rnbqd,qdh->rnbh", out_rnbqd, self.o_proj[...])


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config, *, rngs: nnx.Rngs, param_dtype):
        h, m, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = parameter(rngs, (h, m), ("embed", "mlp"), std, param_dtype)
        self.up_proj = parameter(rngs, (h, m), ("embed", "mlp"), std, param_dtype)
        self.down_proj = parameter(rngs, (m, h), ("mlp", "embed"), std, param_dtype)

    def __call__(self, x_rnbh: Float[Array, "r n b h"]) -> Float[Array, "r n b h"]:
        gate, up = (project("rnbh,hm->rnbm", x_rnbh, w[...]) for w in (self.gate_proj, self.up_proj))
        return project("rnbm,mh->rnbh", jax.nn.silu(gate) * up, self.down_proj[...])


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer of the draft; only the block stream is normalised and updated."""

    def __init__(self, config, *, sliding: bool, rngs: nnx.Rngs, param_dtype):
        self.self_attn = Attention(config, sliding=sliding, rngs=rngs, param_dtype=param_dtype)
        self.mlp = Mlp(config, rngs=rngs, param_dtype=param_dtype)
        self.input_layernorm = norm_scale(config.hidden_size, param_dtype)
        self.post_attention_layernorm = norm_scale(config.hidden_size, param_dtype)
        self.eps = config.rms_norm_eps

    def __call__(
        self,
        x_rnbh: Float[Array, "r n x h"],
        context_kv: tuple[Float[Array, "r s k d"], Float[Array, "r s k d"]],
        geometry: BlockGeometry,
        implementation: str,
        first_slot: int = 0,
    ) -> Float[Array, "r n y h"]:
        """The block's slots from `first_slot` on; their keys and values are still those of all slots."""
        attended = self.self_attn(
            rms_norm(x_rnbh, self.input_layernorm[...], self.eps), context_kv, geometry, implementation
        )
        x_rnbh = (fill_slots(x_rnbh, geometry.num_slots) + attended)[:, :, first_slot:]
        return x_rnbh + self.mlp(rms_norm(x_rnbh, self.post_attention_layernorm[...], self.eps))

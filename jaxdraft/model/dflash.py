"""The DFlash draft model: a Qwen3-style decoder over blocks of mask tokens that reads a target's hidden states.

Source of the semantics: DFlash's released model (`dflash.model.DFlashDraftModel`) and SpecForge's training code.
Dim suffixes: r rows, s context tokens, n blocks, b slots, h model width, d head_dim.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdraft.model.layers import BlockGeometry, DecoderLayer, norm_scale, parameter, project, rms_norm, rope_table
from jaxdraft.sharding import constrain

LAYER_TYPES = ("full_attention", "sliding_attention")


def default_target_layer_ids(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """The published choice of captured target layers: evenly spread from 1 to L-3 (the middle one for a single layer).

    Raises:
      ValueError: the target is too shallow to give `num_layers` different ids.
    """
    if num_layers == 1:
        return (num_target_layers // 2,)
    ids = tuple(round(1 + i * (num_target_layers - 4) / (num_layers - 1)) for i in range(num_layers))
    if len(set(ids)) != num_layers or min(ids) < 0:
        raise ValueError(
            f"draft.num_layers={num_layers} needs that many distinct layers of a target with {num_target_layers}; "
            "lower it or set draft.target_layer_ids yourself"
        )
    return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Shape and semantics of a draft. Everything that the exported `config.json` needs to rebuild it."""

    hidden_size: int
    """Model width; the target's, whose embedding and LM head the draft uses."""
    intermediate_size: int
    """Width of the SwiGLU MLP."""
    num_layers: int
    """Draft decoder layers (5 in the published drafts)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads."""
    head_dim: int
    """Width of a head; even, because rotary positions pair its halves."""
    vocab_size: int
    """Rows of the target's embedding and LM head."""
    block_size: int
    """Slots of a block, the anchor's included."""
    target_layer_ids: tuple[int, ...]
    """Target layers whose outputs are the features, ascending."""
    num_target_layers: int
    """Layers of the target's text model."""
    mask_token_id: int
    """Token in the slots to be predicted."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary positions; the target's."""
    layer_types: tuple[str, ...] | None = None
    """full_attention or sliding_attention for each layer; None means all full."""
    sliding_window: int | None = None
    """Window W of the sliding layers in tokens, the query's own included."""
    is_causal: bool | None = None
    """In-block causality of every layer; None means sliding layers are causal and full layers are not."""
    input_embedding_scale: float | None = None
    """Factor on the block's input embeddings; None means 1."""
    output_multiplier: float | None = None
    """Factor on the logits, before soft-capping; None means 1."""
    final_logit_softcapping: float | None = None
    """Cap c of logits c·tanh(logits/c); None means no cap."""
    initializer_range: float | None = None
    """Standard deviation of the initial projection weights; None: the inverse root of each one's number of inputs."""
    max_position_embeddings: int = 40960
    """Longest sequence; written to the exported config, not used in training."""

    def __post_init__(self):
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_layers)
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        )
        for name in (*sizes, "num_target_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"draft.{name}={getattr(self, name)} must be at least 1; set it from the target's config"
                )
        if self.block_size < 2:
            raise ValueError(f"draft.block_size={self.block_size} predicts nothing; use at least 2 (16 is published)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"draft.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; change one"
            )
        if self.head_dim % 2:
            raise ValueError(f"draft.head_dim={self.head_dim} must be even for rotary positions; use 64 or 128")
        self._check_target()
        self._check_layers()
        for name in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"draft.{name}={getattr(self, name)} must be positive; copy it from the target's config"
                )
        for name in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping", "initializer_range"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"draft.{name}={value} must be positive; leave it out for none")

    def _check_target(self):
        ids = self.target_layer_ids
        if not ids:
            raise ValueError("draft.target_layer_ids=() captures nothing; leave it out for the default layers")
        if any(a >= b for a, b in itertools.pairwise(ids)):
            raise ValueError(
                f"draft.target_layer_ids={ids} must be strictly ascending, the order engines capture in; sort them"
            )
        if ids[0] < 0 or ids[-1] >= self.num_target_layers:
            raise ValueError(
                f"draft.target_layer_ids={ids} must lie in 0..{self.num_target_layers - 1}, the target's layers; "
                "count the text layers only"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"draft.mask_token_id={self.mask_token_id} must be below vocab_size={self.vocab_size}; "
                "choose an unused token inside the vocabulary"
            )

    def _check_layers(self):
        if len(self.layer_types) != self.num_layers or not set(self.layer_types) <= set(LAYER_TYPES):
            raise ValueError(
                f"draft.layer_types={self.layer_types} must name one of {LAYER_TYPES} for each of the "
                f"{self.num_layers} layers; correct the list"
            )
        if "sliding_attention" not in self.layer_types:
            return
        # A window inside the block is refused: SpecForge and z-lab disagree about it.
        if self.sliding_window is None or self.sliding_window < self.block_size:
            raise ValueError(
                f"draft.sliding_window={self.sliding_window} must be at least block_size={self.block_size} when "
                "layer_types has sliding_attention; raise it"
            )

    @property
    def feature_size(self) -> int:
        """Width of the concatenated target features, K·H."""
        return len(self.target_layer_ids) * self.hidden_size


class DFlashDraft(nnx.Module):
    """The draft. `context` runs once on a row's features; `__call__` runs the blocks against it."""

    def __init__(self, config: DraftConfig, *, rngs: nnx.Rngs, dtype=jnp.bfloat16, param_dtype=jnp.float32):
        h = config.hidden_size
        self.config, self.dtype = config, dtype
        self.fc = parameter(
            rngs, (config.feature_size, h), ("features", "embed"), config.initializer_range, param_dtype
        )
        self.hidden_norm = norm_scale(h, param_dtype)
        self.layers = nnx.List(
            [
                DecoderLayer(config, sliding=kind == "sliding_attention", rngs=rngs, param_dtype=param_dtype)
                for kind in config.layer_types
            ]
        )
        self.norm = norm_scale(h, param_dtype)

    def context(self, features: Float[Array, "r s kh"]) -> Float[Array, "r s h"]:
        """c = hidden_norm(fc(features)), in the compute dtype; every layer's keys and values project it.

        Where devices share a row, each works on its slice of the tokens, and only c is gathered.
        """
        features = constrain(features, ("rows", "context", None))
        c_rsh = project("rsf,fh->rsh", features.astype(self.dtype), self.fc[...])
        c_rsh = constrain(rms_norm(c_rsh, self.hidden_norm[...], self.config.rms_norm_eps), ("rows", "context", None))
        return constrain(c_rsh, ("rows", None, None))

    def __call__(
        self,
        block_embeddings: Float[Array, "r n x h"],
        context: Float[Array, "r s h"],
        *,
        anchors: Int[Array, "r n"],
        valid: Bool[Array, "r n"],
        segment_start: Int[Array, "r s"],
        implementation: str = "auto",
        predicted_only: bool = False,
    ) -> Float[Array, "r n y h"]:
        """Hidden states of every slot after the final norm; LM head not applied. Invalid blocks see nothing.

        Args:
          block_embeddings: embeddings of [anchor token, MASK, MASK, ...], before `input_embedding_scale`; of fewer than
            block_size slots, the last one stands for those that are left out.
          context: what `context` returned.
          anchors: row index of each block's anchor; a block sees context [its sample's start, anchor). An anchor s,
            one past the row, continues its last sample, as in decoding.
          valid: False for blocks that do not exist.
          segment_start: first row index of the sample that each token belongs to.
          implementation: of the attention, see `jaxdraft.ops.block_attention`.
          predicted_only: leave out slot 0, and the work that only slot 0 needs.
        """
        geometry = block_geometry(self.config, anchors, valid, segment_start)
        x_rnbh = block_embeddings.astype(self.dtype)
        if self.config.input_embedding_scale is not None:
            x_rnbh = x_rnbh * self.config.input_embedding_scale
        context_kv = self._context_kv(context)
        for layer, kv in zip(self.layers, context_kv, strict=True):
            first_slot = int(predicted_only and layer is self.layers[-1])
            x_rnbh = layer(x_rnbh, kv, geometry, implementation, first_slot)
        return rms_norm(x_rnbh, self.norm[...], self.config.rms_norm_eps)

    def _context_kv(self, context: Float[Array, "r s h"]) -> list[tuple[Array, Array]]:
        """Each layer's keys and values of the context, [r, s, k, d], neither normalised nor rotated: one product."""
        weights = [w[...] for layer in self.layers for w in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        kv_rswkd = project("rsh,whkd->rswkd", context, jnp.stack(weights))
        return [(kv_rswkd[:, :, i], kv_rswkd[:, :, i + 1]) for i in range(0, len(weights), 2)]


def block_geometry(
    config: DraftConfig, anchors: Int[Array, "r n"], valid: Bool[Array, "r n"], segment_start: Int[Array, "r s"]
) -> BlockGeometry:
    """Positions and context intervals of the blocks: slot k at anchor a has position a + k within its sample."""
    slot_b = jnp.arange(config.block_size)
    start_rn = jnp.take_along_axis(segment_start, anchors, axis=1, mode="clip")
    position_rnb = (anchors - start_rn)[..., None] + slot_b
    position_rs = jnp.arange(segment_start.shape[1]) - segment_start
    sliding_start = None
    if "sliding_attention" in config.layer_types:
        sliding_start = jnp.maximum(start_rn[..., None], anchors[..., None] + slot_b - (config.sliding_window - 1))
    return BlockGeometry(
        context_rope=rope_table(position_rs, config.head_dim, config.rope_theta),
        block_rope=rope_table(position_rnb, config.head_dim, config.rope_theta),
        start=start_rn,
        sliding_start=sliding_start,
        end=anchors,
        valid=valid,
    )


# Outside the module, parameters are one flat dict keyed by their path, "layers.0.self_attn.q_proj": a plain pytree that
# jit, optax, Orbax and the export table all read without knowing NNX.


def init_params(config: DraftConfig, key: Array, param_dtype=jnp.float32) -> dict[str, Array]:
    """Fresh parameters, a pure function of `key`."""
    model = DFlashDraft(config, rngs=nnx.Rngs(params=key), param_dtype=param_dtype)
    return {_name(path): param.get_value() for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def bind(config: DraftConfig, params: dict[str, Array], dtype=jnp.bfloat16) -> DFlashDraft:
    """The model with these parameters. Cheap and traceable: call it inside a jitted function.

    Raises:
      ValueError: names or shapes are not those of `config`.
    """
    graphdef, abstract = nnx.split(_abstract(config, dtype))
    expected = {path: param.shape for path, param in nnx.to_flat_state(abstract)}
    found = {name: array.shape for name, array in params.items()}
    if {_name(path): shape for path, shape in expected.items()} != found:
        wrong = {_name(p): s for p, s in expected.items()}.items() ^ found.items()
        raise ValueError(
            f"draft parameters do not fit the config: {sorted(dict(wrong))[:4]} differ; use its own config"
        )
    return nnx.merge(graphdef, nnx.from_flat_state([(path, params[_name(path)]) for path in expected]))


def parameter_axes(config: DraftConfig) -> dict[str, tuple[str | None, ...]]:
    """Logical axis names of every parameter, for `jaxdraft.sharding`."""
    state = nnx.state(_abstract(config, jnp.float32), nnx.Param)
    return {_name(path): param.get_metadata()["axes"] for path, param in nnx.to_flat_state(state)}


def _abstract(config: DraftConfig, dtype) -> DFlashDraft:
    return nnx.eval_shape(lambda: DFlashDraft(config, rngs=nnx.Rngs(params=0), dtype=dtype))


def _name(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def block_input_embeddings(
    embedding: Float[Array, "v h"],
    tokens: Int[Array, "r s"],
    anchors: Int[Array, "r n"],
    valid: Bool[Array, "r n"],
    config: DraftConfig,
) -> Float[Array, "r n two h"]:
    """Embeddings of [token[a], MASK] for each block, whose further slots are MASK too; an invalid block is all MASK."""
    anchor_tokens = jnp.where(valid, jnp.take_along_axis(tokens, anchors, axis=1), config.mask_token_id)
    first_rnh = embedding[anchor_tokens]
    # MASK's embedding is broadcast, so only the n anchors' embeddings are gathered for each row.
    mask_rnh = jnp.broadcast_to(embedding[config.mask_token_id], first_rnh.shape)
    return jnp.stack([first_rnh, mask_rnh], axis=2)

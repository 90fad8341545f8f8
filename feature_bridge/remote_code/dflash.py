"""The DFlash draft model for PyTorch and transformers, to be read beside its weights:

    draft = transformers.AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
    tokens = draft.propose(target, token_ids, features)

`features` are the outputs of the target's layers `draft.target_layer_ids` at every token but the last, concatenated:
transformers' `hidden_states[l + 1]` for each id l, in that order. The last of `token_ids` is the anchor. Proposed are
block_size - 1 tokens, to be verified by the target. No cache: the context is projected again for every block.

Legend: n batch, a context tokens, b block slots, h hidden size, q query heads, j key and value heads, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config

OF_OTHER_DRAFTS = (
    "projector_type",
    "pure_draft_prefix_len",
    "shift_label",
    "selector_rank",
    "conv_kernel_size",
    "attention_sink_bias",
    "add_swa_attention_sink_bias",
    "attention_value_scale",
    "sample_from_anchor",
    "use_swa",
)
IN_TWO_PLACES = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Queries from the block, keys and values from context and block; RMSNorm per head before the rotation."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, block_nbh: Tensor, context_nah: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        def heads(x: Tensor, projection: nn.Linear) -> Tensor:
            return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        num_slots = block_nbh.shape[1]
        source = torch.cat([context_nah, block_nbh], dim=1)
        cos, sin = rope
        q = rotate(self.q_norm(heads(block_nbh, self.q_proj)), cos[:, -num_slots:], sin[:, -num_slots:])
        k = rotate(self.k_norm(heads(source, self.k_proj)), cos, sin)
        v = heads(source, self.v_proj)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        h, m = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, m, bias=False)
        self.up_proj = nn.Linear(h, m, bias=False)
        self.down_proj = nn.Linear(m, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, block_nbh: Tensor, context_nah: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        # The context enters the attention as it is, without this layer's norm.
        block_nbh = block_nbh + self.self_attn(self.input_layernorm(block_nbh), context_nah, rope, visible)
        return block_nbh + self.mlp(self.post_attention_layernorm(block_nbh))


class DFlashDraftModel(PreTrainedModel):
    """Hidden states of a block's slots from the target's features; embedding and LM head are the target's own."""

    config_class = Qwen3Config
    _no_split_modules = ("DecoderLayer",)

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        refuse_what_is_not_computed(config)
        fields = getattr(config, "dflash_config", None) or {}

        def either(name: str, default=None):
            return fields.get(name, getattr(config, name, default))

        self.block_size = int(either("block_size", 16))
        self.mask_token_id = int(either("mask_token_id"))
        self.target_layer_ids = tuple(either("target_layer_ids"))
        self.input_embedding_scale = float(either("input_embedding_scale", 1.0))
        self.output_multiplier = float(either("output_multiplier", 1.0))
        self.final_logit_softcapping = float(either("final_logit_softcapping") or 0.0)
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        is_causal = getattr(config, "is_causal", None)  # of every layer; else sliding ones are causal in the block
        self.causal = sliding if is_causal is None else [bool(is_causal)] * len(sliding)
        self.windows = [config.sliding_window if one else None for one in sliding]
        self.rope_theta = float(config.rope_parameters["rope_theta"])

        self.fc = nn.Linear(len(self.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, noise_embedding: Tensor, target_hidden: Tensor, **_) -> Tensor:
        """Hidden states [n, b, h] of the block after `target_hidden`.

        Args:
          noise_embedding: the target's embedding of [anchor token, MASK, MASK, ...], [n, b, h], not scaled yet.
          target_hidden: the features of every token before the anchor, [n, a, layers * h].
        """
        num_context, num_slots = target_hidden.shape[1], noise_embedding.shape[1]
        context_nah = self.hidden_norm(self.fc(target_hidden))
        rope = self._rope(num_context + num_slots, noise_embedding)
        hidden = noise_embedding * self.input_embedding_scale
        for layer, window, causal in zip(self.layers, self.windows, self.causal, strict=True):
            visible = visible_keys(num_context, num_slots, window, causal, hidden.device)
            hidden = layer(hidden, context_nah, rope, visible)
        return self.norm(hidden)

    def compute_logits(self, hidden: Tensor, lm_head: nn.Module) -> Tensor:
        """The target's head on the draft's hidden states, and the draft's own scalars."""
        logits = lm_head(hidden) * self.output_multiplier
        cap = self.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap > 0 else logits

    @torch.inference_mode()
    def propose(self, target: PreTrainedModel, token_ids: Tensor, features: Tensor) -> Tensor:
        """The block_size - 1 tokens [n, b - 1] that the draft expects after `token_ids` [n, a + 1]."""
        masks = token_ids.new_full((len(token_ids), self.block_size - 1), self.mask_token_id)
        embedding = target.get_input_embeddings()(torch.cat([token_ids[:, -1:], masks], dim=1))
        hidden = self(embedding.to(self.dtype), features.to(self.dtype))
        head = target.get_output_embeddings()
        return self.compute_logits(hidden[:, 1:].to(head.weight.dtype), head).argmax(-1)

    def _rope(self, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, positions, d] in float32 angles, the two halves of a head equal."""
        d = self.config.head_dim
        frequencies = self.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device=like.device) / d)
        angles = torch.arange(num_positions, dtype=torch.float32, device=like.device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)[None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def refuse_what_is_not_computed(config: Qwen3Config) -> None:
    """Raises ValueError: a field that this model does not compute, or that programs read in different ways."""
    nested, rope, kinds = getattr(config, "dflash_config", None) or {}, config.rope_parameters, config.layer_types
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters is nested by layer type, which is not supported; write it flat")
    if rope["rope_type"] != "default" or rope.get("mrope_section") is not None:
        raise ValueError(f"rope_parameters={rope} is not supported, only plain rope")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError("partial_rotary_factor is not supported, only 1")
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {unknown}, which is not supported")
    if "sliding_attention" in kinds and not (config.sliding_window and config.use_sliding_window):
        raise ValueError("layer_types has sliding_attention without use_sliding_window and a sliding_window")
    neutral = {"hidden_act": "silu", "attention_bias": False, "is_neox_style": True, "rope_is_neox_style": True}
    for name, value in neutral.items():
        if (found := getattr(config, name, value)) != value:
            raise ValueError(f"{name}={found!r} is not supported, only {value!r}")
    for name in OF_OTHER_DRAFTS:
        if nested.get(name) or getattr(config, name, None):
            raise ValueError(f"{name} is not supported")
    for name in IN_TWO_PLACES:
        if name in nested and hasattr(config, name) and nested[name] != getattr(config, name):
            raise ValueError(f"{name} in dflash_config is not that of the top level; write one of them")
    if getattr(config, "num_target_layers", None) is None:
        raise ValueError("num_target_layers is missing at the top level")
    top = getattr(config, "is_causal", None)
    for name in ("is_causal", "causal"):
        wanted = nested.get(name)
        if wanted is not None and any((k == "sliding_attention" if top is None else top) != wanted for k in kinds):
            raise ValueError(f"{name} in dflash_config is not read; write is_causal at the top level")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, tokens, d] by the angles of its tokens [1, tokens, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def visible_keys(num_context: int, num_slots: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Which keys [b, a + b] each slot sees: context and block, cut by causality and by the window."""
    slot = torch.arange(num_context, num_context + num_slots, device=device)[:, None]
    key = torch.arange(num_context + num_slots, device=device)[None, :]
    visible = torch.ones(num_slots, num_context + num_slots, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (key <= slot)
    if window is not None:
        visible = visible & (slot - key < window) & (key - slot < window)
    return visible

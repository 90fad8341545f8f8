"""The exported draft in PyTorch, which proposes the blocks when the bridge decodes.

Reads the directory that `jaxdraft.export` writes, and z-lab's published ones. No cache: the context is projected again
for every block, which is simple and cannot go stale. Equal to z-lab's `dflash.model.DFlashDraftModel` on one block.

Legend: A context tokens = the anchor's position, B block slots, H hidden size, W feature width, Q query and J kv heads,
D head dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_bridge.draft_files import DraftShape, read_shape
from feature_bridge.model_files import draft_tensors, read_config


class TorchDraft:
    """A draft's weights, by their exported names, and its forward pass over one block."""

    def __init__(self, shape: DraftShape, weights: dict[str, Tensor]):
        self.shape = shape
        self.weights = weights

    @classmethod
    def load(cls, directory: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> TorchDraft:
        """Load an exported directory, every tensor converted to `dtype`.

        Raises:
          ValueError: no config.json, one that `read_shape` refuses, or weights that are not exactly the draft's.
        """
        shape = read_shape(read_config(directory, "draft"))
        weights = draft_tensors(Path(directory), "pt")
        if difference := sorted(set(weights) ^ set(weight_names(shape.num_layers))):
            raise ValueError(f"draft {directory} has missing or extra tensors {difference[:4]}; export it again")
        return cls(shape, {name: weight.to(device, dtype) for name, weight in weights.items()})

    @torch.inference_mode()
    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        """Hidden states [B, H] of one block whose anchor is at position A, given the features of everything before it.

        Args:
          embedding_bh: the target's embedding of [anchor token, MASK, MASK, ...], after `scale_embedding`.
          features_aw: the target's captured layers at positions 0 .. A-1.
        """
        shape, num_context, num_slots = self.shape, len(features_aw), len(embedding_bh)
        context_ah = self._norm("hidden_norm", features_aw @ self.weights["fc.weight"].T)
        angles = rope_angles(num_context + num_slots, shape.head_dim, shape.rope_theta, embedding_bh.device)
        rope = (angles.cos().to(embedding_bh.dtype), angles.sin().to(embedding_bh.dtype))
        h_bh = embedding_bh
        for layer in range(shape.num_layers):
            visible = visible_keys(
                num_context, num_slots, shape.windows[layer], shape.causal[layer], embedding_bh.device
            )
            prefix = f"layers.{layer}."
            x_bh = self._norm(prefix + "input_layernorm", h_bh)
            h_bh = h_bh + self._attention(prefix + "self_attn.", x_bh, context_ah, rope, visible)
            x_bh = self._norm(prefix + "post_attention_layernorm", h_bh)
            gate, up, down = (self.weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            h_bh = h_bh + (F.silu(x_bh @ gate.T) * (x_bh @ up.T)) @ down.T
        return self._norm("norm", h_bh)

    def scale_embedding(self, embedding: Tensor) -> Tensor:
        """The factor that newer configs put on the block's embeddings."""
        scale = self.shape.input_embedding_scale
        return embedding if scale is None else embedding * scale

    def scale_logits(self, logits: Tensor) -> Tensor:
        """The scalars that newer configs put after the target's LM head."""
        if self.shape.output_multiplier is not None:
            logits = logits * self.shape.output_multiplier
        cap = self.shape.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _attention(
        self, prefix: str, x_bh: Tensor, context_ah: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        shape, num_slots = self.shape, len(x_bh)

        def heads(x: Tensor, name: str) -> Tensor:
            return (x @ self.weights[f"{prefix}{name}.weight"].T).unflatten(-1, (-1, shape.head_dim)).transpose(0, 1)

        keys_from = torch.cat([context_ah, x_bh])  # the context enters without the layer's input norm
        q_qbd = rotate(self._norm(prefix + "q_norm", heads(x_bh, "q_proj")), rope, slice(-num_slots, None))
        k_jsd = rotate(self._norm(prefix + "k_norm", heads(keys_from, "k_proj")), rope, slice(None))
        v_jsd = heads(keys_from, "v_proj")
        out_qbd = F.scaled_dot_product_attention(
            q_qbd[None], k_jsd[None], v_jsd[None], attn_mask=visible, enable_gqa=True
        )[0]
        return out_qbd.transpose(0, 1).flatten(1) @ self.weights[prefix + "o_proj.weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm as Qwen3 computes it: in fp32, cast back before the weight."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return self.weights[name + ".weight"] * wide.to(x.dtype)


def weight_names(num_layers: int) -> list[str]:
    """The names of an exported draft's tensors."""
    parts = [f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")] + ["input_layernorm", "post_attention_layernorm"]
    layers = [f"layers.{i}.{part}.weight" for i in range(num_layers) for part in parts]
    return [*layers, "fc.weight", "hidden_norm.weight", "norm.weight"]


def rope_angles(num_positions: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles [num_positions, head_dim], fp32, the two halves equal (the rotate_half convention)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat([angles, angles], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], positions: slice) -> Tensor:
    """Apply rope to x [heads, tokens, D] at these positions."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (part[positions] for part in rope)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def visible_keys(num_context: int, num_slots: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Which keys [B, A + B] each slot sees: the whole context and block, cut by causality and by the window."""
    slot = torch.arange(num_context, num_context + num_slots, device=device)[:, None]
    key = torch.arange(num_context + num_slots, device=device)[None, :]
    visible = torch.ones(num_slots, num_context + num_slots, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= slot
    if window is not None:
        visible &= (slot - key < window) & (key - slot < window)  # two-sided where it is not causal
    return visible

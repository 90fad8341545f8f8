"""SGLang's own DFLASH draft model, loaded as its server loads it, on one block at a time.

SGLang serves a draft with a missing tensor and says nothing. So every parameter is NaN before the weights are loaded,
and what is NaN afterwards was never set. Everything that the forward pass computes is SGLang's code, projections,
norms, rope and the context's keys and values among it, except the attention over them: its back end wants a server's
memory pools, so `BlockAttention` stands in for it, with the window and the causality that SGLang's layer has resolved.

Legend: A context tokens, B block slots, H hidden size, W feature width, Q query and J kv heads, D head dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from feature_bridge.model_files import draft_weights
from feature_bridge.targets import sglang_versions as versions


class BlockAttention(nn.Module):
    """In the place of a layer's `RadixAttention`: the block attends to the context's keys and values and to itself."""

    def __init__(self, layer: Any):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self.scaling = layer.scaling
        self.window_left = layer.sliding_window_size  # -1: none
        self.is_causal = layer.attn_type.value == "decoder"
        self.context: tuple[Tensor, Tensor] | None = None  # keys and values, [A, J * D]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Any) -> Tensor:
        assert self.context is not None
        keys, values = (torch.cat(parts) for parts in zip(self.context, (k, v), strict=True))
        slot = torch.arange(len(keys) - len(q), len(keys), device=q.device)[:, None]
        key = torch.arange(len(keys), device=q.device)[None, :]
        visible = (key <= slot) | torch.tensor(not self.is_causal, device=q.device)
        if self.window_left >= 0:
            visible &= slot - key <= self.window_left
        q, keys, values = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, visible, scale=self.scaling, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


class SGLangDraft:
    """The draft of a directory in SGLang's class, float32. The process must run an `SGLangTarget`.

    Raises ValueError, as SGLang says it, for a draft that its server would refuse.
    """

    def __init__(self, directory: Path, server_args: Any, device: torch.device):
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader.utils import get_model_architecture

        model_config = ModelConfig.from_server_args(server_args, model_path=str(directory), is_draft_model=True)
        cls, _ = get_model_architecture(model_config)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # of its parameters
        try:
            with torch.device(device):
                model = cls(model_config.hf_config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        files = [load_file(file, device=str(device)) for file in draft_weights(directory)]
        model.load_weights(item for tensors in files for item in tensors.items())
        for layer in model.layers:
            layer.self_attn.attn = BlockAttention(layer.self_attn)
        self._model = model.float().eval()
        versions.use_native_ops(self._model)

    @property
    def version(self) -> str:
        return f"{versions.installed_version()}, attention by a stand-in"

    @property
    def fields(self) -> dict[str, Any]:
        config, rope = versions.draft_config(self._model), self._model.layers[0].self_attn.rotary_emb
        layer_ids = config.target_layer_ids
        if layer_ids is None:  # then it reads as many layers as the draft has, evenly spread
            num_layers = len(self._model.layers)
            layer_ids = config.resolve_target_layer_ids(
                target_num_layers=config.num_target_layers or num_layers, draft_num_layers=num_layers
            )
        return {
            "block_size": int(self._model.block_size),
            "target_layer_ids": [int(l) for l in layer_ids],
            "mask_token_id": config.mask_token_id,
            "rope_theta": float(rope.base),
            "rms_norm_eps": float(self._model.norm.variance_epsilon),
            "input_embedding_scale": 1.0,  # neither its model nor its worker has such a factor
            # Releases without these fields ignore what config.json says of them.
            "output_multiplier": float(getattr(config, "output_multiplier", 1.0)),
            "final_logit_softcapping": float(getattr(config, "final_logit_softcapping", None) or 0.0),
        }

    def weights(self) -> dict[str, Tensor]:
        """The tensors by exported name, SGLang's fused matrices split; without those that have a NaN: never loaded."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            module, _, fused = name.removesuffix(".weight").rpartition(".")
            if fused == "qkv_proj":
                layer = self._model.get_submodule(module)
                parts = parameter.split([layer.q_size, layer.kv_size, layer.kv_size])
                found |= {f"{module}.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)}
            elif fused == "gate_up_proj":
                gate, up = parameter.chunk(2)
                found |= {f"{module}.gate_proj.weight": gate, f"{module}.up_proj.weight": up}
            else:
                found[name] = parameter
        return {name: weight for name, weight in found.items() if not weight.isnan().any()}

    @torch.inference_mode()
    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        """Hidden states [B, H] of a block whose anchor is at position A."""
        num_context, num_slots = len(features_aw), len(embedding_bh)
        positions = torch.arange(num_context + num_slots, device=embedding_bh.device)
        with versions.plain_norms():
            context_ah = self._model.project_target_hidden(features_aw)
            for layer in self._model.layers:
                attention = layer.self_attn
                k, v = attention.kv_proj_only(context_ah)
                k = attention.apply_k_rope(positions[:num_context], attention.apply_k_norm(k))
                attention.attn.context = (k, v)
            return self._model(None, positions[num_context:], None, input_embeds=embedding_bh).hidden_states

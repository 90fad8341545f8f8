"""SpecForge's training step with our weights and anchors, for step.py. Needs torch, transformers and specforge."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.modeling.draft.dflash import DFlashDraftModel
from transformers import Qwen3Config

from jaxdraft.losses import LossConfig
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import to_tensors


def to_torch(array: jax.Array) -> torch.Tensor:
    """A copy of a jax array, where it is."""
    return torch.from_dlpack(jax.block_until_ready(array)).clone()


class SpecForge:
    """Forward and backward of `OnlineDFlashModel` in bfloat16."""

    def __init__(self, draft: DraftConfig, loss: LossConfig, params, frozen, batch, anchors, *, backend: str):
        config = Qwen3Config(
            hidden_size=draft.hidden_size,
            intermediate_size=draft.intermediate_size,
            num_hidden_layers=draft.num_layers,
            num_attention_heads=draft.num_heads,
            num_key_value_heads=draft.num_kv_heads,
            head_dim=draft.head_dim,
            vocab_size=draft.vocab_size,
            rms_norm_eps=draft.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": draft.rope_theta},
            layer_types=list(draft.layer_types),
            max_window_layers=0,
            tie_word_embeddings=False,
        )
        config.block_size, config.num_target_layers = draft.block_size, draft.num_target_layers
        config.dflash_config = {
            "target_layer_ids": list(draft.target_layer_ids),
            "mask_token_id": draft.mask_token_id,
        }
        config._attn_implementation = backend
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(self.device):
            self.draft = DFlashDraftModel(config)
        tensors = jax.jit(to_tensors, static_argnums=1)(params, draft)
        self.draft.load_state_dict({name: to_torch(x) for name, x in tensors.items()}, strict=True)
        # Casting a module casts its rotary frequencies too, and positions in the thousands turn into noise: keep them.
        frequencies = self.draft.rotary_emb.inv_freq.clone()
        self.draft.to(self.device, torch.bfloat16).train()
        self.draft.rotary_emb.inv_freq = frequencies.to(self.device)
        head = to_torch(frozen.head)
        lm_head = torch.nn.Linear(*head.shape[::-1], bias=False, device="meta")
        lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        self.model = OnlineDFlashModel(
            self.draft,
            lm_head,
            torch.nn.Embedding.from_pretrained(head, freeze=True),
            mask_token_id=draft.mask_token_id,
            block_size=draft.block_size,
            attention_backend=backend,
            num_anchors=anchors.shape[1],
            loss_decay_gamma=loss.gamma,
        )
        injected = to_torch(anchors).long()
        keep = torch.ones_like(injected, dtype=torch.bool)
        self.model._sample_anchor_positions = lambda *_: (injected, keep)
        self.inputs = (
            to_torch(batch.tokens).long(),
            to_torch(batch.features),
            to_torch(batch.loss_mask).float(),
        )

    def step(self) -> torch.Tensor:
        """One forward and backward, waited for; returns the loss."""
        self.draft.zero_grad(set_to_none=True)
        loss, _, _ = self.model(*self.inputs)
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss

    def loss_and_gradients(self) -> tuple[float, dict[str, jax.Array]]:
        """The gradients by their names in a checkpoint."""
        loss = float(self.step().detach())
        return loss, {name: jax.dlpack.from_dlpack(p.grad) for name, p in self.draft.named_parameters()}

    def measure(self, chunk_blocks: int, timer: Callable) -> tuple[list[float], float, float]:
        """(milliseconds of each step, peak GB, seconds until the first step is done)."""
        self.model.objective_chunk_blocks = chunk_blocks
        started = time.perf_counter()
        self.step()
        first = time.perf_counter() - started
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = timer(self.step)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else float("nan")
        return times, peak, first

    def close(self) -> None:
        del self.model, self.draft, self.inputs
        if self.device == "cuda":
            torch.cuda.empty_cache()

"""SpecForge's training step, for step.py: its `OnlineDFlashModel` has our objective."""

from __future__ import annotations

import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.modeling.draft.dflash import DFlashDraftModel

from benchmarks.step_peers import Peer, cast_parameters, qwen3_config, to_torch


class SpecForge(Peer):
    """All its weights are in `dtype`; tied ones are one matrix."""

    name = "SpecForge"
    gpu_attention = "flex_attention"
    variants = ("chunk 128", "chunk 0")
    """Blocks whose logits are computed at a time, 0: all."""

    def build(self, draft, loss, tensors, frozen, batch, anchors):
        config = qwen3_config(draft, self.attention)
        config.block_size, config.num_target_layers = draft.block_size, draft.num_target_layers
        config.dflash_config = {
            "target_layer_ids": list(draft.target_layer_ids),
            "mask_token_id": draft.mask_token_id,
        }
        with torch.device(self.device):
            self.draft = DFlashDraftModel(config)
        self.draft.load_state_dict(tensors, strict=True)
        cast_parameters(self.draft.train(), self.dtype)
        head = to_torch(frozen.head).to(self.dtype)
        tied = frozen.embedding is frozen.head
        embedding = head if tied else to_torch(frozen.embedding).to(self.dtype)
        lm_head = torch.nn.Linear(*head.shape[::-1], bias=False, device="meta")
        lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        self.model = OnlineDFlashModel(
            self.draft,
            lm_head,
            torch.nn.Embedding.from_pretrained(embedding, freeze=True),
            mask_token_id=draft.mask_token_id,
            block_size=draft.block_size,
            attention_backend=self.attention,
            num_anchors=anchors.shape[1],
            loss_decay_gamma=loss.decay(draft.block_size),
        )
        injected = to_torch(anchors).long()
        keep = torch.ones_like(injected, dtype=torch.bool)
        self.model._sample_anchor_positions = lambda *_: (injected, keep)
        self.inputs = (
            to_torch(batch.tokens).long(),
            to_torch(batch.features).to(self.dtype),
            to_torch(batch.loss_mask).float(),
        )

    def use(self, variant):
        self.model.objective_chunk_blocks = int(variant.removeprefix("chunk "))

    def forward(self):
        loss, _, _ = self.model(*self.inputs)
        return loss

"""The training step of vLLM's `speculators`, for step.py: its model, called as its trainer (train/trainer.py) calls it.

Its package imports pydantic, openai and datasets as well.
"""

from __future__ import annotations

import unittest.mock

import jax.numpy as jnp
import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core

from benchmarks.step_peers import Peer, cast_parameters, qwen3_config, to_torch
from jaxdraft.losses import block_labels, decay_weights


def narrow_search() -> None:
    """Its fused loss tries 21 tiles, each compiled first, for minutes; here two, those that its source says to win."""
    from speculators.losses import fused  # needs triton

    for kernel in (fused.loss_forward_kernel, fused.loss_backward_kernel):
        best = [c for c in kernel.configs if (c.kwargs["BLOCK_SIZE"], c.num_warps) in ((8192, 8), (16_384, 16))]
        kernel.configs[:] = best or kernel.configs


class Speculators(Peer):
    """Forward and backward, with its trainer's attention, fused loss, `torch.compile` and autocast.

    Its objective differs from ours in five points; four are settings or inputs, and one is a factor:

    - A label is the target's most likely token, where ours is the sample's next one. It computes it, from the target's
      last hidden states, its final norm and its head, in every step. Here those states are the head's rows of the next
      tokens, so that the label is that token; the product with the head (2·min(S, N·B)·V·H FLOP) stays in its step.
    - Its trainer weighs slots by D-PACE with alpha 0.5; set to the decay exp(-(k-1)/gamma), with our gamma (its 4.0).
    - It divides by the number of supervised slots, we by the sum of their weights: the loss is multiplied by the ratio.
    - It draws anchors that leave a whole block before the row's end, each step anew. Ours are put in its place.
    - It takes one row, of several documents; a label may lie in the next document. Here a row is one.

    Not counted as work: the target's head above, and slot 0 of each block, whose logits it computes and masks.
    The draft's vocabulary is the target's (no t2d and d2t), and all its layers attend to the whole context.
    """

    name = "speculators"
    gpu_attention = "simple_flex_attention"
    variants = ("float32 weights, autocast", "bfloat16 weights")
    """Its trainer's on one GPU, and what it computes with where it shards the weights (FSDP)."""

    def build(self, draft, loss, tensors, frozen, batch, anchors):
        rows, block = len(batch.tokens), draft.block_size
        assert rows == 1, "speculators takes one packed row"
        assert int(jnp.max(batch.segment_start)) == 0, "its labels cross documents"
        assert int(jnp.max(anchors)) < batch.tokens.shape[1] - block, "a block would leave the row"
        assert loss.kind == "dflash", loss
        config = DFlashSpeculatorConfig(
            transformer_layer_config=qwen3_config(draft, self.attention),
            draft_vocab_size=draft.vocab_size,
            block_size=block,
            aux_hidden_state_layer_ids=[layer + 1 for layer in draft.target_layer_ids],
            mask_token_id=draft.mask_token_id,
        )
        if self.device == "cuda":
            narrow_search()
        with torch.device(self.device):
            self.draft = DFlashDraftModel(config).train()
        head = to_torch(frozen.head)
        of_the_target = {
            "embed_tokens.weight": to_torch(frozen.embedding),
            "lm_head.weight": head,
            "verifier_lm_head.weight": head,
            "verifier_norm.weight": torch.ones_like(head[0]),
        }
        self.draft.load_state_dict(tensors | of_the_target, strict=True)

        tokens = to_torch(batch.tokens).long()
        injected = to_torch(anchors)[0].long()
        self.anchors = injected, torch.ones_like(injected, dtype=torch.bool)
        self.inputs = {
            "hidden_states": to_torch(batch.features).to(self.dtype),
            "input_ids": tokens,
            "loss_mask": to_torch(batch.loss_mask).bool(),
            "verifier_last_hidden_states": head[tokens.roll(-1, dims=1)].to(self.dtype),
            "document_ids": torch.zeros_like(tokens),
            "position_ids": torch.arange(tokens.shape[1], device=self.device)[None],
            "loss_config": resolve_loss_config("ce", "fused" if self.device == "cuda" else "eager"),
            "gamma": loss.decay(block),
            "max_anchors": anchors.shape[1],
            "per_position_loss_weight": "fixed-exp-decay",
        }
        self.check_labels()
        labels = block_labels(
            batch.tokens, batch.loss_mask, batch.segment_start, batch.num_tokens, anchors, anchors >= 0, block
        )
        weights = labels.supervised * decay_weights(block - 1, loss.decay(block))
        self.scale = float(jnp.sum(labels.supervised) / jnp.sum(weights))
        self.conversion = f" (its mean over slots x {self.scale:.4f}, labels by its target's head)"

    def check_labels(self) -> None:
        """Its labels are ours: the target's head finds each next token most likely."""
        states, tokens = self.inputs["verifier_last_hidden_states"][0], self.inputs["input_ids"][0]
        with torch.no_grad():
            chunks = self.draft.verifier_norm(states.float()).split(512)
            found = torch.cat([self.draft.verifier_lm_head(chunk).argmax(-1) for chunk in chunks])
        assert torch.equal(found, tokens.roll(-1)), "the target's head does not tell these tokens apart"

    def use(self, variant):
        cast_parameters(self.draft, getattr(torch, variant.split()[0]))

    def forward(self):
        injected = unittest.mock.patch.object(core, "select_anchors", return_value=self.anchors)
        with injected, torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            _, loss, _ = self.draft(**self.inputs)
        return self.scale * loss

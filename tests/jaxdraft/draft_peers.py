"""The peers' models with our weights: z-lab's released draft, SpecForge's training objective."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from draft_helpers import samples_of

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.losses import LossConfig
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import to_tensors
from jaxdraft.objective import Batch, Frozen

torchvision_ops.ensure()  # before transformers: its Qwen3 imports torchvision

from dflash.model import DFlashDraftModel as ZlabDraft  # noqa: E402
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel  # noqa: E402
from specforge.modeling.draft.dflash import DFlashDraftModel as SpecForgeDraft  # noqa: E402
from transformers import Qwen3Config  # noqa: E402


def peer_config(config: DraftConfig) -> Qwen3Config:
    """The transformers config from which both peers build their draft."""
    sliding = "sliding_attention" in config.layer_types
    peer = Qwen3Config(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        layer_types=list(config.layer_types),
        use_sliding_window=sliding,
        sliding_window=config.sliding_window if sliding else None,
        max_window_layers=0,
        tie_word_embeddings=False,
    )
    peer.block_size = config.block_size
    peer.num_target_layers = config.num_target_layers
    peer.dflash_config = {"target_layer_ids": list(config.target_layer_ids), "mask_token_id": config.mask_token_id}
    if config.is_causal is not None:
        peer.is_causal = config.is_causal
    peer._attn_implementation = "sdpa"
    return peer


def load_peer(model: torch.nn.Module, params: dict[str, jnp.ndarray], config: DraftConfig) -> torch.nn.Module:
    """Our weights, strictly by name, in a peer's model."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in to_tensors(params, config).items()}
    model.load_state_dict(tensors, strict=True)
    return model.float().eval()


def zlab_draft(config: DraftConfig, params, **scalars) -> ZlabDraft:
    """z-lab's model with our weights; `scalars` go into its dflash_config."""
    peer = peer_config(config)
    peer.dflash_config |= scalars
    return load_peer(ZlabDraft(peer), params, config)


class SpecForgeObjective:
    """SpecForge's training objective with our weights and our anchors, one sample at a time."""

    def __init__(self, config: DraftConfig, loss: LossConfig, params, frozen: Frozen):
        self.draft = load_peer(SpecForgeDraft(peer_config(config)), params, config)
        head, embedding = (torch.from_numpy(np.array(x)) for x in (frozen.head, frozen.embedding))
        lm_head = torch.nn.Linear(*head.shape[::-1], bias=False)
        lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        self.model = OnlineDFlashModel(
            self.draft,
            lm_head,
            torch.nn.Embedding.from_pretrained(embedding, freeze=True),
            mask_token_id=config.mask_token_id,
            block_size=config.block_size,
            attention_backend="sdpa",
            loss_decay_gamma=loss.decay(config.block_size),
            loss_type=loss.kind,
            dpace_alpha=loss.dpace_alpha,
            objective_chunk_blocks=0,
        )

    def terms(self, batch: Batch, anchors, valid) -> tuple[torch.Tensor, float, float, float]:
        """(numerator, denominator, correct, supervised) summed over the samples of a packed batch."""
        totals = [torch.zeros(()), 0.0, 0.0, 0.0]
        anchors, valid = np.asarray(anchors), np.asarray(valid)
        for row, start, end in samples_of(batch):
            mine = (anchors[row] >= start) & (anchors[row] < end)
            keep = valid[row][mine]
            if not keep.any():
                # D-PACE's denominator counts the sample all the same.
                supervised = bool(np.asarray(batch.loss_mask[row, start:end]).any())
                totals[1] += float(supervised) * (self.model.loss_type != "dflash")
                continue
            injected = (torch.from_numpy(anchors[row][mine] - start).long()[None], torch.from_numpy(keep)[None])
            self.model._sample_anchor_positions = lambda *_, injected=injected: injected
            tokens, mask, features = (
                torch.from_numpy(np.array(x[row, start:end]))[None]
                for x in (batch.tokens, batch.loss_mask, batch.features)
            )
            _, _, metrics = self.model(tokens.long(), features, mask.float())
            numerator, denominator = metrics["loss_terms"]
            correct, supervised = metrics["ratio_metrics"]["acc"]
            for i, x in enumerate((numerator, float(denominator), float(correct), float(supervised))):
                totals[i] = totals[i] + x
        return tuple(totals)

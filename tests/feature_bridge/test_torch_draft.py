"""The bridge's draft against z-lab's own class, one block at a time."""

import json

import pytest
import torch
from safetensors.torch import save_file

from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.draft_files import read_shape
from feature_bridge.torch_draft import TorchDraft

BASE = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": 6,
    "dflash_config": {"mask_token_id": 96, "target_layer_ids": [1, 2, 4]},
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 40,
    "intermediate_size": 72,
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_target_layers": 7,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "vocab_size": 97,
}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 9,
    "use_sliding_window": True,
}


def make_peer(**changes):
    """z-lab's model with random weights, norms included."""
    torchvision_ops.ensure()  # it imports transformers' image code
    from dflash.model import DFlashDraftModel
    from transformers import Qwen3Config

    torch.manual_seed(3)
    model = DFlashDraftModel(Qwen3Config(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.2 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("num_context", [0, 1, 5, 37])
@pytest.mark.parametrize(
    "changes",
    [{}, SLIDING, {**SLIDING, "is_causal": False}, {"is_causal": True}],
    ids=["full", "sliding", "two-sided", "causal"],
)
def test_equal_to_z_lab(changes, num_context):
    peer = make_peer(**changes)
    ours = TorchDraft(read_shape({**BASE, **changes}), dict(peer.named_parameters()))
    features = torch.randn(num_context, 3 * 40)
    embedding = torch.randn(6, 40)
    with torch.inference_mode():
        expected = peer(
            position_ids=torch.arange(num_context + 6)[None],
            noise_embedding=embedding[None],
            target_hidden=features[None],
        )[0]
    torch.testing.assert_close(ours(embedding, features), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_equal_to_z_lab():
    peer = make_peer(**SLIDING).bfloat16()
    peer.rotary_emb.inv_freq = make_peer(**SLIDING).rotary_emb.inv_freq  # .bfloat16() rounded it
    ours = TorchDraft(read_shape({**BASE, **SLIDING}), dict(peer.named_parameters()))
    features, embedding = torch.randn(23, 120).bfloat16(), torch.randn(6, 40).bfloat16()
    with torch.inference_mode():
        expected = peer(
            position_ids=torch.arange(29)[None], noise_embedding=embedding[None], target_hidden=features[None]
        )[0]
    torch.testing.assert_close(ours(embedding, features), expected, rtol=2e-2, atol=2e-2)


def test_old_and_new_config_forms_agree():
    new = {k: v for k, v in BASE.items() if k not in ("block_size", "rope_theta")}
    new["dflash_config"] = {**BASE["dflash_config"], "block_size": 6}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5_000_000.0}
    assert read_shape(new) == read_shape(BASE)


def test_scalars_of_newer_configs():
    shape = read_shape({**BASE, "dflash_config": {**BASE["dflash_config"], "final_logit_softcapping": 2.0}})
    logits = torch.tensor([-50.0, 0.1, 50.0])
    torch.testing.assert_close(TorchDraft(shape, {}).scale_logits(logits), 2 * torch.tanh(logits / 2))
    shape = read_shape({**BASE, "output_multiplier": 0.5})
    torch.testing.assert_close(TorchDraft(shape, {}).scale_logits(logits), logits / 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "architectures"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_refuses_what_it_does_not_compute(change, named):
    with pytest.raises(ValueError, match=named):
        read_shape({**BASE, **change})


def test_load_refuses_a_missing_tensor(tmp_path):
    weights = {name: weight.detach().clone() for name, weight in make_peer().named_parameters()}
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    save_file(weights, tmp_path / "model.safetensors")
    assert TorchDraft.load(tmp_path, dtype=torch.float32).shape.block_size == 6
    del weights["layers.1.self_attn.k_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_norm\.weight"):
        TorchDraft.load(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"config\.json"):
        TorchDraft.load(tmp_path / "absent", dtype=torch.float32)

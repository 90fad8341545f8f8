"""Tiny checkpoints of the target families, random weights, made in a second each: `make_model(family, directory)`."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import torch

from feature_bridge.cpu_stand_ins import torchvision_ops

torchvision_ops.ensure()
import transformers  # noqa: E402

LAYER_IDS = {
    "qwen3": (0, 1, 2),
    "qwen3_moe": (0, 1, 2),
    "llama": (0, 1, 2),
    "qwen3_vl": (0, 1, 2),
    "qwen2_5_vl": (0, 1, 2),
    "qwen3_5": (0, 2, 3, 6),
    "qwen3_5_moe": (0, 2, 3, 6),
}
FAMILIES = tuple(LAYER_IDS)
TEXT_FAMILIES = ("qwen3", "qwen3_moe", "llama")
VOCAB_SIZE = 521  # no multiple of anything
_SPECIAL = {"image_token_id": 501, "video_token_id": 502, "vision_start_token_id": 503, "vision_end_token_id": 504}
_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 505,
    "eos_token_id": 506,
    "pad_token_id": 505,
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 96,
}
_VISION_3_5 = _VISION | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": []}
_TEXT_3_5 = _TEXT | {
    "num_hidden_layers": 8,
    "head_dim": 64,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "partial_rotary_factor": 0.25,  # SGLang reads it here
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def make_model(family: str, directory: Path) -> Path:
    """Write a float32 checkpoint of the family's architecture class; returns its directory."""
    makers = (_qwen3, _qwen3_moe, _llama, _qwen3_vl, _qwen2_5_vl, _qwen3_5, _qwen3_5_moe)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the decays keep their initial values
        model = dict(zip(FAMILIES, makers, strict=True))[family]()
    _randomise(model)
    path = directory / family
    model.float().save_pretrained(path)
    return path


def _qwen3():
    config = transformers.Qwen3Config(head_dim=32, tie_word_embeddings=False, **_TEXT)
    return transformers.Qwen3ForCausalLM(config)


def _qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        head_dim=32, tie_word_embeddings=False, norm_topk_prob=True, **_EXPERTS, **_TEXT
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _llama():
    """Llama 3.x: its way of stretching the rope, a long rope base, heads in groups."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(rope_parameters=rope, tie_word_embeddings=True, **_TEXT)
    return transformers.LlamaForCausalLM(config)


def _qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    # Deepstack: what the tower's layers 0 and 1 see is added after decoder layers 0 and 1.
    vision = _VISION | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(
        text_config=_TEXT | {"head_dim": 32, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
        **_SPECIAL,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl():
    rope = {"rope_type": "default", "type": "mrope", "rope_theta": 1e6, "mrope_section": [4, 6, 2]}
    vision = _VISION | {"patch_size": 14, "spatial_patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision | {"tokens_per_second": 2},
        tie_word_embeddings=False,
        **_SPECIAL,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_5():
    config = transformers.Qwen3_5Config(
        text_config=_TEXT_3_5, vision_config=_VISION_3_5, tie_word_embeddings=True, **_SPECIAL
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def _qwen3_5_moe():
    text = {name: value for name, value in _TEXT_3_5.items() if name != "intermediate_size"} | _EXPERTS
    # Every token goes to every expert: of thousands of choices some are so close that rounding, which differs between
    # CPUs, decides them. `_qwen3_moe`, with fewer tokens, has the choice.
    text["num_experts_per_tok"] = text["num_experts"]
    config = transformers.Qwen3_5MoeConfig(
        text_config=text | {"shared_expert_intermediate_size": 48, "tie_word_embeddings": False},
        vision_config=_VISION_3_5,
        tie_word_embeddings=False,
        **_SPECIAL,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


@contextlib.contextmanager
def frames_together() -> Iterator[None]:
    """transformers' vision tower of Qwen2.5-VL as SGLang runs it: all frames of a video attend to each other."""

    def cu_seqlens(grid_thw, kwargs=None):
        return torch.nn.functional.pad(grid_thw.prod(-1).cumsum(0, dtype=torch.int32), (1, 0))

    with unittest.mock.patch("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.get_vision_cu_seqlens", cu_seqlens):
        yield


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights that make every layer, head and norm matter, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(0.08 * noise)
        elif "A_log" not in name and "dt_bias" not in name:
            parameter.add_(0.1 * noise)

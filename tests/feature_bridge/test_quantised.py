"""Targets with quantised layers: the features are those of the numbers that their weights stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch import Tensor

from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.targets import load_target
from feature_bridge.targets.base import Request

GROUP, BLOCK = 8, 16  # columns with one scale; rows and columns with one scale
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def float8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with a scale for every row, as llm-compressor stores it: (tensors by suffix, the numbers they stand for)."""
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    narrow = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": narrow, "weight_scale": scale}, narrow.float() * scale


def packed4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """4 bits with a scale for every group of a row, packed: what AWQ and GPTQ end in."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1) / 7
    whole = (groups / scale[..., None]).round().clamp(-8, 7)
    eights = (whole + 8).long().reshape(len(weight), -1, 8) << (4 * torch.arange(8))
    tensors = {
        "weight_packed": eights.sum(-1).to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, (whole * scale[..., None]).reshape(weight.shape)


def float8_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with a scale for every block, as Qwen publishes it."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.reshape(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / LARGEST
    each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    narrow = (weight / each).to(torch.float8_e4m3fn)
    return {"weight": narrow, "weight_scale_inv": scale}, narrow.float() * each


def compressed(kind: str, **weights: object) -> dict:
    weights |= {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


KINDS = {
    "float8": (float8, compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "packed4": (packed4, compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)),
    "float8_blocks": (
        float8_blocks,
        {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]},
    ),
}


def features(directory: Path, dtype: str) -> tuple[Tensor, Tensor]:
    """(features, the LM head)."""
    spec = BridgeSpec(
        target=TargetSpec(path=str(directory), layer_ids=(0, 2), backend="huggingface", dtype=dtype),
        data=DataSpec(train_path=None, max_length=64, min_supervised=1),
        rows_per_slot=1,
        row_tokens=64,
    )
    target = load_target(spec)
    tokens = np.random.default_rng(0).integers(0, 100, 40).astype(np.int32)
    return target.extend([Request(tokens=tokens)]).features, target.frozen()["head"]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_numbers(kind, tmp_path):
    quantise, described = KINDS[kind]
    plain = make_model("qwen3", tmp_path / "plain")
    config, tensors = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors")
    narrow, meant = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name:
            parts, meant[name] = quantise(tensor)
            stem = name.removesuffix("weight")
            narrow |= {stem + suffix: part for suffix, part in parts.items()}
        else:
            narrow[name] = meant[name] = tensor
    for name, some, extra in (("narrow", narrow, {"quantization_config": described}), ("meant", meant, {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | extra))
        save_file({k: v.contiguous() for k, v in some.items()}, tmp_path / name / "model.safetensors", {"format": "pt"})

    got, head = features(tmp_path / "narrow", "float32")
    wanted, own_head = features(tmp_path / "meant", "float32")
    assert float((got - wanted).norm() / wanted.norm()) < 1e-6
    assert float((features(plain, "float32")[0] - wanted).norm() / wanted.norm()) > 1e-3
    assert torch.equal(head, own_head)
    narrow_features, head = features(tmp_path / "narrow", "bfloat16")
    assert narrow_features.dtype == head.dtype == torch.bfloat16
    assert float((narrow_features.float() - wanted).norm() / wanted.norm()) < 0.05

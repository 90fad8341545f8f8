"""A random text target with few tokens, so that a random draft is sometimes right; for tests of decoding and replay."""

from pathlib import Path

import torch

from feature_bridge.contracts import TargetSpec
from feature_bridge.cpu_stand_ins import torchvision_ops

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS = 11, 32, 4


def open_target(directory, layer_ids, max_tokens=200):
    """The transformers target of a directory, float32."""
    torchvision_ops.ensure()
    from feature_bridge.targets.huggingface import HuggingFaceTarget

    spec = TargetSpec(path=str(directory), dtype="float32", layer_ids=layer_ids)
    return HuggingFaceTarget(spec, Path(directory), max_tokens=max_tokens)


def write_target(directory):
    """A Qwen3 of four layers with random weights."""
    torchvision_ops.ensure()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory

"""A draft of odd sizes and its target, to export."""

import dataclasses

import numpy as np

from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import tensor_table

CONFIG = DraftConfig(
    hidden_size=40,
    intermediate_size=72,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=97,
    block_size=6,
    target_layer_ids=(1, 2, 4),
    num_target_layers=7,
    mask_token_id=96,
    rope_theta=5e6,
)
SLIDING = dataclasses.replace(
    CONFIG, layer_types=("sliding_attention", "full_attention", "sliding_attention"), sliding_window=9
)
TARGET = {  # a vision-language target: everything in text_config
    "tie_word_embeddings": True,
    "eos_token_id": [90, 91],
    "text_config": {
        "hidden_size": 40,
        "vocab_size": 97,
        "num_hidden_layers": 7,
        "bos_token_id": None,
        "eos_token_id": 91,
        "pad_token_id": 90,
        "rope_parameters": {"rope_theta": 5e6, "mrope_section": [3, 3, 2], "rope_type": "default"},
    },
}

K_NORM = "layers.1.self_attn.k_norm.weight"


def random_tensors(config=CONFIG, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.normal(1, 0.2, row.exported) if "norm" in name else generator.normal(0, 0.2, row.exported)
        ).astype(np.float32)
        for name, row in tensor_table(config).items()
    }

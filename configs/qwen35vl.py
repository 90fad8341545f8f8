"""Draft for Qwen3.5-4B, text and images: the published recipe.

    python -m jaxdraft.train --config qwen35vl.py --data.train-path conversations.jsonl

Answers in the data should be the target's own; about 800 K samples and 6 epochs are the published scale.
"""

from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="qwen35vl",
        target=TargetConfig(
            path="Qwen/Qwen3.5-4B",
            revision="851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a",
            backend="sglang",
        ),
        data=DataConfig(
            train_path="data/train.jsonl", eval_fraction=0.002, row_tokens=4096, min_pixels=50176, max_pixels=802816
        ),
        draft=DraftOptions(
            num_layers=5, block_size=16, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=9728,
            mask_token_id=248070,
        ),
        loss=LossConfig(kind="dflash", gamma=7.0),
        optim=OptimConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        bridge=BridgeConfig(transport="cuda_ipc", num_slots=3),
        epochs=6,
    )  # fmt: skip

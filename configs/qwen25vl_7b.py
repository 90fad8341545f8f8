"""Draft for Qwen2.5-VL-7B, text and images: the published recipe.

python -m jaxdraft.train --config qwen25vl_7b.py --data.train-path conversations.jsonl
"""

from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="qwen25vl_7b",
        target=TargetConfig(
            path="Qwen/Qwen2.5-VL-7B-Instruct",
            revision="cc594898137f460bfe9f0759e9844b3ce807cfb5",
            backend="sglang",
        ),
        data=DataConfig(
            train_path="data/train.jsonl", eval_fraction=0.002, row_tokens=4096, min_pixels=50176, max_pixels=802816
        ),
        draft=DraftOptions(num_layers=5, block_size=16, num_heads=32, num_kv_heads=8, head_dim=128),
        loss=LossConfig(kind="dflash", gamma=7.0),
        optim=OptimConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        bridge=BridgeConfig(transport="cuda_ipc", num_slots=3),
        epochs=6,
    )

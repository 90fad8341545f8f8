"""Draft for Qwen3-8B, text only: the published recipe.

python -m jaxdraft.train --config qwen3_8b.py --data.train-path conversations.jsonl
"""

from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="qwen3_8b",
        target=TargetConfig(
            path="Qwen/Qwen3-8B", revision="b968826d9c46dd6066d109eabc6255188de91218", backend="sglang"
        ),
        data=DataConfig(train_path="data/train.jsonl", eval_fraction=0.002, row_tokens=4096),
        draft=DraftOptions(num_layers=5, block_size=16, mask_token_id=151669),
        loss=LossConfig(kind="dflash", gamma=7.0),
        optim=OptimConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        bridge=BridgeConfig(transport="cuda_ipc", num_slots=3),
        epochs=6,
    )

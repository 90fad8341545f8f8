"""Draft for SmolLM2-135M-Instruct as `benchmarks.journey.kit` converts it: a small text model with a real tokenizer.

Every id of its vocabulary is in use; 4 (<reponame>) occurs in no conversation.
"""

from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="smollm2_135m",
        target=TargetConfig(path="kit/model", backend="sglang"),
        data=DataConfig(train_path=None, row_tokens=4096),
        draft=DraftOptions(num_layers=5, block_size=8, mask_token_id=4),
        optim=OptimConfig(learning_rate=1e-3, warmup_ratio=0.04, clip_norm=1.0),
        bridge=BridgeConfig(transport="cuda_ipc", num_slots=3),
        epochs=6,
        max_new_tokens=320,
    )

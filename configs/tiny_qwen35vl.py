"""The demo: a draft for the embedded tiny-qwen35vl target, on a CPU with 2 cores in under 5 minutes.

    make demo

The target is a real `Qwen3_5ForConditionalGeneration` of 1.9 M parameters that talks about pictures; see configs/tiny/.
"""

from pathlib import Path

from jaxdraft.config import Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig

TINY = Path(__file__).resolve().parent / "tiny"


def get_config() -> Config:
    return Config(
        name="tiny_qwen35vl",
        target=TargetConfig(path=str(TINY / "target"), dtype="float32"),
        data=DataConfig(
            train_path=str(TINY / "train.jsonl"),
            eval_path=str(TINY / "eval.jsonl"),
            eval_rows=16,
            row_tokens=512,
        ),
        draft=DraftOptions(num_layers=3, block_size=8, head_dim=32, target_layer_ids=(1, 3, 6), initializer_range=0.08),
        loss=LossConfig(kind="dflash", gamma=3.0),
        optim=OptimConfig(learning_rate=4e-3, warmup_ratio=0.04, clip_norm=1.0),
        compute_dtype="float32",
        rows_per_device=1,
        epochs=5,
        eval_interval=1000,
        save_interval=250,
        log_interval=20,
        num_decode=8,
        max_new_tokens=160,
    )

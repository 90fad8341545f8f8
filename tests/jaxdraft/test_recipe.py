"""The published recipe, number by number: in the configs, and in what a config gets that leaves it out."""

import pytest

from jaxdraft.cli import load_config
from jaxdraft.config import Config, DataConfig, TargetConfig
from jaxdraft.optim import OptimConfig


@pytest.mark.parametrize(
    ("name", "mask", "pixels"),
    [("qwen35vl", 248070, (50176, 802816)), ("qwen25vl_7b", None, (50176, 802816)), ("qwen3_8b", 151669, (None, None))],
)
def test_the_published_recipe(name, mask, pixels):
    config = load_config(name)
    bare = Config(name="x", target=TargetConfig(path="t"), data=DataConfig(train_path=None))
    for each in (config, bare):
        assert each.optim == OptimConfig(
            learning_rate=6e-4, warmup_ratio=0.04, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
        )
        assert (each.loss.kind, each.loss.decay(each.draft.block_size), each.loss.dpace_alpha) == ("dflash", 7.0, 0.5)
        assert (each.draft.num_layers, each.draft.block_size, each.epochs) == (5, 16, 6)
        assert (each.anchor_rule, each.compute_dtype, each.data.too_long) == ("head", "bfloat16", "truncate")
        assert each.num_anchors == 683  # ceil(512 * 4096 / 3072)
        assert each.draft.target_layer_ids is None
    assert config.draft.mask_token_id == mask
    assert (config.data.min_pixels, config.data.max_pixels) == pixels

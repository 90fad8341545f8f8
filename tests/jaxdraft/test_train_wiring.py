"""What the config says is what the step is made of and called with. One process, and a bridge without a target."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import runs
from fake_worker import TrainingWorker
from rich.console import Console

import jaxdraft.bridges
from jaxdraft import train
from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.data import Schedule
from jaxdraft.losses import LossConfig
from jaxdraft.model.dflash import init_params
from jaxdraft.optim import OptimConfig
from jaxdraft.sharding import make_mesh
from jaxdraft.train_step import StepConfig


class FirstStep(Exception):
    """With what the loop gives to its first step."""


@pytest.mark.parametrize("float32_gradients", [False, True])
def test_the_step_is_the_configs(tmp_path, monkeypatch, float32_gradients):
    """Every value another than the default; the last step is completed by rows without samples."""
    config = Config(
        name="wiring",
        output_dir=str(tmp_path),
        target=TargetConfig(path=str(runs.TINY / "target"), dtype="float32"),
        data=DataConfig(train_path="of the fake worker", row_tokens=70),
        draft=DraftOptions(num_layers=1, block_size=4, intermediate_size=64, mask_token_id=1240),
        loss=LossConfig(kind="dpace", gamma=3.0, dpace_alpha=0.2),
        optim=OptimConfig(learning_rate=1e-3, warmup_ratio=0.5, beta1=0.8, weight_decay=0.1, clip_norm=None),
        bridge=BridgeConfig(transport="in_process", feature_dtype="float32"),
        seed=11,
        epochs=2,
        rows_per_device=2,
        accumulation=3,
        anchors_per_row=7,
        anchor_rule="pr505",
        attention="xla",
        float32_gradients=float32_gradients,
    )
    made = []

    def make_train_step(*args, **options):
        made.append(args[:4])

        def step(state, batch, key):
            copies = jax.tree.map(np.array, (state.params, batch.row_ids, batch.num_tokens))  # a slot is given back
            raise FirstStep(copies, key)

        return step

    monkeypatch.setattr(train, "make_train_step", make_train_step)
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(jaxdraft.bridges, "DEFAULT_WORKER", "fake_worker:TrainingWorker")
    with pytest.raises(FirstStep) as first:
        train.train(config, Console(quiet=True))

    lengths = np.array([TrainingWorker._length(None, "train", i) for i in range(TrainingWorker.NUM["train"])])
    schedule = Schedule(lengths, seed=11, epochs=2, row_tokens=70)
    assert len(schedule.rows) % 6, "no row is left over: choose others"
    ((draft, *rest),) = made
    options = StepConfig(
        num_anchors=7,
        total_steps=len(schedule.rows) // 6 + 1,
        anchor_rule="pr505",
        accumulation=3,
        compute_dtype="bfloat16",
        attention="xla",
        keep_narrow=not float32_gradients,
        float32_gradients=float32_gradients,
    )
    assert rest == [config.loss, config.optim, options]
    assert (draft.block_size, draft.mask_token_id, draft.intermediate_size) == (4, 1240, 64)

    (params, row_ids, num_tokens), key = first.value.args
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(11))).all()
    for name, expected in init_params(draft, jax.random.key(11)).items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-6, err_msg=name)
    assert row_ids.tolist() == [0, 1]
    assert num_tokens.tolist() == [lengths[list(samples)].sum() for samples in schedule.rows[:2]]

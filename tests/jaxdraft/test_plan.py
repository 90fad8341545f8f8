"""The plan of a run: its arguments and outputs are XLA's own, its estimates those of a recorded run."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest
import runs

from jaxdraft.cli import load_config
from jaxdraft.config import MeshConfig
from jaxdraft.plan import (
    Machine,
    abstract_step,
    advice,
    device_bytes,
    main,
    plan_mesh,
    plan_step,
    scaling,
    step_options,
)
from jaxdraft.sharding import make_mesh
from jaxdraft.target import make_draft_config, open_target
from jaxdraft.train_step import make_train_step


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = load_config(str(runs.write_config(tmp_path_factory.mktemp("plan"))))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, row_tokens=64), anchors_per_row=6)
    return config, make_draft_config(config.draft, open_target(config.target))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_arguments_and_outputs_are_xlas(tiny, sizes, tied):
    config, draft = tiny
    data, fsdp, tensor = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    arguments, outputs = abstract_step(config, draft, mesh, tied=False)
    frozen, *_ = arguments
    step = make_train_step(draft, config.loss, config.optim, step_options(config), frozen, mesh=mesh)
    *rest, key = arguments
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = step.func.lower(*rest, key).compile()
    measured = compiled.memory_analysis()
    assert measured.argument_size_in_bytes == device_bytes(arguments)
    metrics = jax.tree.leaves(compiled.out_info[1])
    metric_bytes = sum(metric.size * metric.dtype.itemsize for metric in metrics)
    pointers = 8 * len(jax.tree.leaves(compiled.out_info))  # the table of outputs that XLA counts on a CPU
    assert measured.output_size_in_bytes == device_bytes(outputs) + metric_bytes + pointers
    assert measured.alias_size_in_bytes == device_bytes(outputs)
    shared, _ = abstract_step(config, draft, mesh, tied=True)
    matrix = draft.vocab_size * draft.hidden_size * 4 // tensor
    assert device_bytes(arguments) - device_bytes(shared) == matrix


def recipe(tmp_path, *args, **changes):
    """The reference recipe on the benchmark's row of 3072 tokens, with a target that is only a config.json."""
    text = {"num_hidden_layers": 32, "hidden_size": 2560, "vocab_size": 248_320, "intermediate_size": 9216}
    text |= {"num_attention_heads": 16, "head_dim": 256, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "tie_word_embeddings": True}))
    config = load_config("qwen35vl.py")
    config = dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, path=str(tmp_path)),
        data=dataclasses.replace(config.data, row_tokens=3072),
        **changes,
    )
    return config, make_draft_config(config.draft, open_target(config.target))


def test_estimates_of_the_recorded_step(tmp_path):
    """benchmarks/RESULTS.md, one H200: 50.2 TFLOP, 86.4 ms, 13.2 GB at the peak (no moments, one slot, no target)."""
    config, draft = recipe(tmp_path)
    plan = plan_step(config, draft, plan_mesh(config, 1), Machine(), tied=True)
    assert plan.flop / 1e12 == pytest.approx(50.2, rel=0.01)
    assert plan.seconds(Machine())[0] == pytest.approx(0.0864, rel=0.2)
    assert not plan.traffic
    memory = dict(plan.memory)
    memory["masters and moments"] //= 3  # the masters
    memory["features and rows, in slots"] //= config.bridge.num_slots
    assert sum(memory.values()) / 1e9 == pytest.approx(13.2, rel=0.2)


def test_axes_divide_what_they_should(tmp_path):
    config, draft = recipe(tmp_path)

    def on(data, fsdp, tensor):
        mesh = plan_mesh(dataclasses.replace(config, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor)), 8)
        return plan_step(config, draft, mesh, Machine(), tied=True)

    replicas, sharded, split = on(8, 1, 1), on(1, 8, 1), on(4, 1, 2)
    assert sharded.memory["gradients"] < replicas.memory["gradients"] / 7.9
    assert split.memory["embedding and head"] == replicas.memory["embedding and head"] / 2
    assert split.memory["features and rows, in slots"] < 0.51 * replicas.memory["features and rows, in slots"]
    assert split.flop == replicas.flop / 2
    assert set(replicas.traffic) == {"gradients, summed over data"}
    assert "context, gathered over tensor" in split.traffic
    with pytest.raises(ValueError, match=r"do not multiply to the 6 devices"):
        plan_mesh(dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), 6)


def test_advice_names_the_axis(tmp_path):
    config, draft = recipe(tmp_path)
    mesh = plan_mesh(config, 1)
    small = Machine(memory_gb=16)
    assert "raise mesh.fsdp (now 1)" in advice(plan_step(config, draft, mesh, small, tied=True), small, mesh)
    large = dataclasses.replace(config, rows_per_device=32)
    assert "lower rows_per_device" in advice(plan_step(large, draft, mesh, Machine(), tied=True), Machine(), mesh)
    assert advice(plan_step(config, draft, mesh, Machine(), tied=True), Machine(), mesh).startswith("fits: ")


def test_scaling_curve(tmp_path):
    config, draft = recipe(tmp_path)
    lines = scaling(config, draft, Machine(), [1, 8, 1024], tied=True)
    assert lines[0][3] == 1
    assert lines[0][3] > lines[1][3] > lines[2][3] > 0
    assert lines[1][2] < 8 * lines[0][2]


def test_command(tmp_path, capsys):
    recipe(tmp_path)
    main(
        ["--config", "qwen35vl.py", "--target.path", str(tmp_path), "--devices", "16", "--mesh.fsdp", "8",
         "--tokens", "800", "--target-params", "4", "--scaling"]
    )  # fmt: skip
    output = capsys.readouterr().out
    for words in ("masters and moments", "fits: ", "between hosts", "GPU-hours", "1024", "cache of all features"):
        assert words in output

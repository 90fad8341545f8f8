"""The plan of a run: its arguments and outputs are XLA's own, its estimates those of a recorded run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
import runs

from jaxdraft.cli import load_config
from jaxdraft.config import MeshConfig
from jaxdraft.export import export_draft
from jaxdraft.model.dflash import init_params
from jaxdraft.model.tensors import to_tensors
from jaxdraft.plan import (
    Machine,
    abstract_step,
    advice,
    device_bytes,
    main,
    plan_mesh,
    plan_step,
    scaling,
)
from jaxdraft.run import step_config
from jaxdraft.sharding import make_mesh
from jaxdraft.target import make_draft_config, open_target
from jaxdraft.train_step import make_train_step

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = load_config(str(runs.write_config(tmp_path_factory.mktemp("plan"))))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, row_tokens=64), anchors_per_row=6)
    return config, make_draft_config(config.draft, open_target(config.target))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_arguments_and_outputs_are_xlas(tiny, sizes):
    config, draft = tiny
    data, fsdp, tensor = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    arguments, outputs = abstract_step(config, draft, mesh, tied=False)
    frozen, *_ = arguments
    step = make_train_step(draft, config.loss, config.optim, step_config(config, total_steps=1), frozen, mesh=mesh)
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


# Targets whose recorded steps are in RESULTS.md, by the beginning of their rows there.
SHAPES = {
    "Qwen3.5-4B": ("qwen35vl.py", {"num_hidden_layers": 32, "hidden_size": 2560, "vocab_size": 248_320, "head_dim": 256,
                                   "intermediate_size": 9216, "num_attention_heads": 16, "num_key_value_heads": 4}),
    "Qwen3-8B": ("qwen3_8b.py", {"num_hidden_layers": 36, "hidden_size": 4096, "vocab_size": 151_936, "head_dim": 128,
                                 "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8}),
}  # fmt: skip


def recipe(tmp_path, shape="Qwen3.5-4B", **changes):
    """The reference recipe on the benchmark's row of 3072 tokens, with a target that is only a config.json."""
    name, text = SHAPES[shape]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "tie_word_embeddings": True}))
    config = load_config(name)
    config = dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, path=str(tmp_path)),
        data=dataclasses.replace(config.data, row_tokens=3072),
        **changes,
    )
    return config, make_draft_config(config.draft, open_target(config.target))


def tables(title: str) -> list[list[str]]:
    """Every row of the tables in the section of RESULTS.md that begins so."""
    sections = re.split(r"^## ", RESULTS.read_text(), flags=re.M)
    section = next(section for section in sections if section.startswith(title))
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def number(cell: str) -> float:
    """The first one."""
    return float(re.search(r"[\d.,]+", cell)[0].replace(",", ""))


def recorded(shape: str) -> dict[str, float]:
    """ "ms", "useful TFLOP/s" and "peak GB" of a shape's first row in the tables of the training step.

    "masters": whether the peak has them in it.
    """
    rows = tables("Training step")
    header = next(row for row in rows if "useful TFLOP/s" in row)
    row = next(row for row in rows if row[0].startswith(shape))
    places = {title.split(" (")[0]: i for i, title in enumerate(header)}
    found = {name: number(row[places[name]]) for name in ("ms", "useful TFLOP/s", "peak GB")}
    return found | {"masters": "apart" not in row[places["peak GB"]]}


@pytest.mark.parametrize("shape", SHAPES)
def test_estimates_of_the_recorded_steps(tmp_path, shape):
    """Forward and backward on one H200, to 20 %: no moments, one slot, no target."""
    config, draft = recipe(tmp_path, shape)
    seen, machine = recorded(shape), Machine()
    plan = plan_step(config, draft, plan_mesh(config, 1), machine, tied=True)
    assert plan.flop / 1e9 == pytest.approx(seen["ms"] * seen["useful TFLOP/s"], rel=0.02)
    assert 1e3 * plan.seconds(machine)[0] == pytest.approx(seen["ms"], rel=0.2)
    assert machine.share * machine.tflops == pytest.approx(seen["useful TFLOP/s"], rel=0.2), "plan.Machine.share"
    assert not plan.traffic
    memory = dict(plan.memory)
    memory["masters and moments"] *= seen["masters"] / 3  # no moments
    memory["features and rows, in slots"] //= config.bridge.num_slots
    assert sum(memory.values()) / 1e9 == pytest.approx(seen["peak GB"], rel=0.2)


def test_axes_divide_what_they_should(tmp_path):
    config, draft = recipe(tmp_path)

    def on(data, fsdp, tensor, **changes):
        mesh = plan_mesh(dataclasses.replace(config, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor)), 8)
        return plan_step(dataclasses.replace(config, **changes), draft, mesh, Machine(), tied=True)

    replicas, sharded, split = on(8, 1, 1), on(1, 8, 1), on(4, 1, 2)
    assert sharded.memory["gradients"] < replicas.memory["gradients"] / 7.9
    assert split.memory["embedding and head"] == replicas.memory["embedding and head"] / 2
    assert split.memory["features and rows, in slots"] < 0.51 * replicas.memory["features and rows, in slots"]
    assert split.flop == replicas.flop / 2
    assert set(replicas.traffic) == {"gradients, summed over data"}
    assert "context, gathered over tensor" in split.traffic
    exact = on(8, 1, 1, float32_gradients=True)
    assert exact.memory["gradients"] == 2 * replicas.memory["gradients"]
    assert {name: size / 2 for name, (size, _) in exact.traffic.items()} == {
        name: size for name, (size, _) in replicas.traffic.items()
    }
    with pytest.raises(ValueError, match=r"do not multiply to the 6 devices"):
        plan_mesh(dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), 6)


def test_a_target_over_several_gpus(tmp_path):
    """Each has half of it, and works as much as before, unless the two of them share their rows."""
    config, draft = recipe(tmp_path)
    over_two = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, tensor_parallel=2))

    def on(config, tensor):
        mesh = plan_mesh(dataclasses.replace(config, mesh=MeshConfig(tensor=tensor)), 2)
        return plan_step(config, draft, mesh, Machine(), tied=True, target_params=4e9)

    whole, halves, shared = on(config, 1), on(over_two, 1), on(over_two, 2)
    name = "target's activations, summed over its GPUs"
    assert halves.memory["target"] == shared.memory["target"] == whole.memory["target"] / 2
    assert halves.target_flop == whole.target_flop == 2 * shared.target_flop
    assert name not in whole.traffic
    # Two sums a layer of [3072, 2560] bfloat16 for two rows, of which a GPU sends as much as it has.
    assert halves.traffic[name][0] == 2 * shared.traffic[name][0] == 2 * 32 * 2 * 3072 * 2560 * 2
    machine = Machine(memory_gb=12)
    plan = plan_step(over_two, draft, plan_mesh(over_two, 1), machine, tied=True, target_params=8e9)
    assert "raise bridge.tensor_parallel (now 2)" in advice(plan, machine, plan_mesh(over_two, 1), 2)


def test_advice_names_the_axis(tmp_path):
    config, draft = recipe(tmp_path)
    mesh = plan_mesh(config, 1)
    small = Machine(memory_gb=12)
    assert "raise mesh.fsdp (now 1)" in advice(plan_step(config, draft, mesh, small, tied=True), small, mesh)
    large = dataclasses.replace(config, rows_per_device=32)
    assert "lower rows_per_device" in advice(plan_step(large, draft, mesh, Machine(), tied=True), Machine(), mesh)
    assert advice(plan_step(config, draft, mesh, Machine(), tied=True), Machine(), mesh).startswith("fits: ")


def test_the_published_curve_is_the_plans(tmp_path):
    """Where the model or `Machine.share` changes, print the curve of RESULTS.md again, by the command there."""
    config, draft = recipe(tmp_path)
    data, mesh = dataclasses.replace(config.data, row_tokens=4096), dataclasses.replace(config.mesh, fsdp=8)
    config = dataclasses.replace(config, data=data, mesh=mesh)
    published = {int(row[0]): row for row in tables("Projection") if row[0].isdigit()}
    assert min(published) == 1
    assert max(published) == 1024
    counts = [2**i for i in range(11)]
    for count, seconds, rate, alone, _ in scaling(config, draft, Machine(), counts, tied=True, target_params=4e9):
        if count in published:
            _, ms, rows, efficiency, _ = published[count]
            assert number(ms) == pytest.approx(1e3 * seconds, rel=0.01), count
            assert number(rows) == pytest.approx(rate, rel=0.01), count
            assert number(efficiency) == pytest.approx(100 * alone, abs=0.1), count


def test_scaling_curve(tmp_path):
    config, draft = recipe(tmp_path)
    lines = scaling(config, draft, Machine(), [1, 8, 1024], tied=True)
    assert lines[0][3] == 1
    assert lines[0][3] > lines[1][3] > lines[2][3] > 0
    assert lines[1][2] < 8 * lines[0][2]


def test_scaling_keeps_to_the_mesh(tmp_path):
    """Devices that a group cannot use are no line of the curve, and a tensor group has its rows once."""
    config, draft = recipe(tmp_path)

    def curve(**sizes):
        changed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
        return scaling(changed, draft, Machine(), [1, 2, 4, 8, 16], tied=True)

    assert [line[0] for line in curve(fsdp=5)] == [1, 2, 4]
    plain, tensor = curve(fsdp=1), curve(fsdp=1, tensor=4)
    assert [line[0] for line in tensor] == [1, 2, 4, 8, 16]
    for one, split in zip(plain, tensor, strict=True):
        rows, group = config.rows_per_device * config.accumulation, min(4, one[0])
        assert one[1] * one[2] == pytest.approx(rows * one[0])
        assert split[1] * split[2] == pytest.approx(rows * one[0] // group)


def test_command(tmp_path, capsys):
    recipe(tmp_path)
    main(
        ["--config", "qwen35vl.py", "--target.path", str(tmp_path), "--devices", "16", "--mesh.fsdp", "8",
         "--tokens", "800", "--target-params", "4", "--scaling"]
    )  # fmt: skip
    output = capsys.readouterr().out
    for words in ("masters and moments", "fits: ", "between hosts", "GPU-hours", "1024", "cache of all features"):
        assert words in output
    assert "989 TFLOP/s; 8 GPUs a host at 220 GB/s, hosts at 50 GB/s a GPU (H200)" in output


def test_a_small_run_is_printed_in_small_units(capsys):
    main(["--config", "tiny_qwen35vl.py", "--tokens", "0.1", "--memory-gb", "1"])
    output = capsys.readouterr().out
    assert "MiB" in output
    assert "µs computing" in output
    assert "H200" not in output
    assert not re.search(r"\b0\.0+ ", output)


def test_a_draft_to_start_from_decides_the_shape(tmp_path, capsys):
    config = load_config("tiny_qwen35vl.py")
    target = open_target(config.target)
    draft = dataclasses.replace(make_draft_config(config.draft, target), intermediate_size=32)
    tensors = to_tensors(init_params(draft, jax.random.key(0)), draft)
    exported = export_draft(tensors, draft, target.config, tmp_path / "draft", dtype="float32")
    sizes = []
    for start in ([], ["--draft.init-from", str(exported)]):
        main(["--config", "tiny_qwen35vl.py", *start])
        sizes.append(float(re.search(r"export ([\d.]+)", capsys.readouterr().out)[1]))
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tflops", "0"], "--tflops=0.0 is not a positive number"),
        (["--link-gbs", "nan"], "--link-gbs=nan is not a positive number"),
        (["--tokens", "0"], "--tokens=0.0 is not a positive number"),
        (["--tokens", "inf"], "--tokens=inf is not a positive number"),
        (["--target-params", "-3"], "--target-params=-3.0 is not a positive number"),
        (["--devices", "4", "--bridge.tensor-parallel", "3"], "tensor_parallel=3 does not divide the 4 GPUs of a host"),
        (["--devices", "16", "--bridge.tensor-parallel", "16"], "tensor_parallel=16 does not divide the 8 GPUs"),
        (["--draft.init-from", "nowhere"], "nowhere"),
    ],
)
def test_what_training_refuses_is_not_planned(options, message):
    with pytest.raises(ValueError, match=message):
        main(["--config", "tiny_qwen35vl.py", *options])


def test_a_run_may_end_before_its_epochs_do(capsys):
    main(["--config", "tiny_qwen35vl.py", "--tokens", "1", "--max-steps", "3"])
    assert "5 epochs, 3 steps" in capsys.readouterr().out

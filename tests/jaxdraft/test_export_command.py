"""Exporting the checkpoints of a run, and converting what was exported."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import K_NORM, SLIDING, TARGET, random_tensors

from jaxdraft.checkpoint import Checkpoints, as_json, load_params
from jaxdraft.config import Config, DataConfig, TargetConfig
from jaxdraft.convert import Arguments as ConvertArguments
from jaxdraft.convert import convert, load_draft
from jaxdraft.export import Arguments, export_run
from jaxdraft.model.tensors import from_tensors
from jaxdraft.optim import OptimConfig
from jaxdraft.train_step import StepConfig, init_state


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with two checkpoints, the first one rated better."""
    root = tmp_path_factory.mktemp("runs")
    (root / "target").mkdir()
    (root / "target" / "config.json").write_text(json.dumps(TARGET))
    config = Config(
        name="run", target=TargetConfig(path=str(root / "target")), data=DataConfig(train_path="unused.jsonl")
    )
    meta = as_json({"config": config, "draft": SLIDING, "capture": "layer_output"})
    options = StepConfig(num_anchors=1, total_steps=2)
    with Checkpoints(root / "run", keep=3) as checkpoints:
        for step, rated in ((1, 2.5), (2, 2.0)):
            params = from_tensors(random_tensors(SLIDING, seed=step), SLIDING)
            params = {name: jnp.asarray(value) for name, value in params.items()}
            state = init_state(SLIDING, OptimConfig(), options, jax.random.key(0), params=params)
            checkpoints.save(step, state, meta, tau=rated)
    return root / "run"


@pytest.mark.parametrize(("step", "chosen"), [("best", 1), ("latest", 2), ("2", 2), ("first", 1)])
def test_exports_a_checkpoint_of_a_run(run_dir, tmp_path, step, chosen):
    export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), step=step, dtype="float32"))
    tensors, config = load_draft(tmp_path / "draft")
    assert config == SLIDING
    for name, array in random_tensors(SLIDING, seed=chosen).items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    about = json.loads((tmp_path / "draft" / "export.json").read_text())
    assert (about["step"], about["run"], about["capture"]) == (chosen, "run", "layer_output")


def test_a_step_that_is_no_step(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 'bst' \(a number, best, .*there are: 1, 2"):
        export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), step="bst"))


def test_the_target_may_be_a_hub_id(run_dir, tmp_path, monkeypatch):
    """Of which config.json alone is needed: here it lies in the hub's cache, and nothing answers on the network."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(TARGET))
    (snapshot / "tokenizer.json").write_text("{}")
    draft = tmp_path / "draft"
    on_hub = {"target": "org/model", "revision": commit}
    export_run(Arguments(checkpoint=str(run_dir), output=str(draft), **on_hub))
    assert json.loads((draft / "export.json").read_text())["target"] == "org/model"
    convert(ConvertArguments(draft=str(draft), output=str(tmp_path / "converted"), **on_hub))
    assert load_draft(tmp_path / "converted")[1] == SLIDING
    with pytest.raises(ValueError, match="a hub id needs --revision"):
        convert(ConvertArguments(draft=str(draft), output=str(tmp_path / "again"), target="org/model"))


def test_an_output_that_cannot_be(run_dir, tmp_path):
    export = Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"))
    export_run(export)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output .*file/draft cannot be written"):
        export_run(dataclasses.replace(export, output=str(tmp_path / "file" / "draft")))
    draft = str(tmp_path / "draft")
    again = ConvertArguments(draft=draft, output=f"{draft}/../draft", target=str(run_dir.parent / "target"))
    with pytest.raises(ValueError, match="--output .* holds --draft and would replace it"):
        convert(again)
    assert load_draft(tmp_path / "draft")[1] == SLIDING


def test_the_export_names_what_made_the_features(run_dir, tmp_path, monkeypatch):
    params, meta = load_params(run_dir)
    monkeypatch.setattr("jaxdraft.export.load_params", lambda *_: (params, meta | {"backend": "sglang 0.5.20 (cpu)"}))
    export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft")))
    assert json.loads((tmp_path / "draft" / "export.json").read_text())["backend"] == "sglang 0.5.20 (cpu)"
    assert "| trained on features of | sglang 0.5.20 (cpu) |" in (tmp_path / "draft" / "README.md").read_text()


def test_a_checkpoint_with_a_missing_tensor_is_not_exported(run_dir, tmp_path, monkeypatch):
    params, meta = load_params(run_dir)
    del params["layers.1.self_attn.k_norm"]
    monkeypatch.setattr("jaxdraft.export.load_params", lambda *_: (params, meta))
    with pytest.raises(ValueError, match=rf"{K_NORM} is missing"):
        export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft")))
    assert not (tmp_path / "draft").exists()


def test_a_run_whose_target_has_moved(run_dir, tmp_path):
    arguments = Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), target=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="target '.*gone' does not exist.*--target says where it is"):
        export_run(arguments)


def test_the_command_says_one_sentence(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxdraft.export",
        "--checkpoint",
        str(tmp_path / "no"),
        "--output",
        str(tmp_path / "d"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no checkpoints/ folder" in done.stderr
    assert "Traceback" not in done.stderr

"""The parity gate: every system that is installed agrees with the JAX draft, and every planted fault has its name."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import CONFIG
from rich.console import Console
from runs import run as run_training
from runs import write_config, write_data
from safetensors.numpy import save_file

from jaxdraft import check, export
from jaxdraft.bridges import open_bridge
from jaxdraft.check import (
    check_directory,
    check_draft,
    check_first,
    choose_conversations,
    main,
    of_the_server,
    print_verdicts,
)
from jaxdraft.cli import load_config
from jaxdraft.convert import load_draft
from jaxdraft.export import digest, export_draft
from jaxdraft.model.dflash import init_params
from jaxdraft.model.tensors import from_tensors, to_tensors
from jaxdraft.objective import Frozen
from jaxdraft.parity import FIELDS, SYSTEMS, Blocks, Conversation, Verdict, config_fields, field_difference
from jaxdraft.target import TargetModel, load_frozen, make_draft_config, open_target

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
K_NORM = "layers.1.self_attn.k_norm.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The demo's config on held-out conversations of every kind, its target by transformers in this process."""
    root = tmp_path_factory.mktemp("data")
    lines = (TINY / "eval.jsonl").read_text().splitlines()
    kinds = {}
    for line in lines:
        kinds.setdefault(min(line.count("pictures/"), 2), line)
    assert set(kinds) == {0, 1, 2}
    (root / "eval.jsonl").write_text("\n".join(kinds.values()).replace("pictures/", f"{TINY}/pictures/") + "\n")
    config = load_config("tiny_qwen35vl.py")
    return dataclasses.replace(
        config,
        output_dir=str(root / "runs"),
        target=dataclasses.replace(config.target, backend="huggingface"),
        data=dataclasses.replace(
            config.data, eval_path=str(root / "eval.jsonl"), cache_dir=None, num_workers=1, row_tokens=512
        ),
        draft=dataclasses.replace(config.draft, num_layers=2, block_size=4),
        bridge=dataclasses.replace(config.bridge, transport="in_process", feature_dtype="float32", verify=False),
    )


@pytest.fixture(scope="module")
def draft(config, tmp_path_factory):
    """An export with weights large enough for every one of them to matter."""
    target = open_target(config.target)
    shape = make_draft_config(config.draft, target)
    rng = np.random.default_rng(3)
    params = {
        name: jnp.asarray(rng.normal(1, 0.2, a.shape) if a.ndim == 1 else rng.normal(0, 0.08, a.shape), jnp.float32)
        for name, a in init_params(shape, jax.random.key(0)).items()
    }
    directory = tmp_path_factory.mktemp("drafts") / "draft"
    return export_draft(to_tensors(params, shape), shape, target.config, directory)


@pytest.fixture
def copy(draft, tmp_path):
    return Path(shutil.copytree(draft, tmp_path / "draft"))


def edit(directory, **fields):
    """Change config.json; dflash_config's fields in there."""
    config = json.loads((directory / "config.json").read_text())
    for name, value in fields.items():
        nested = config.get("dflash_config", {})
        (nested if name in nested else config)[name] = value
    (directory / "config.json").write_text(json.dumps(config))


def rewrite(directory, change):
    """Change the tensors."""
    tensors, _ = load_draft(directory)
    save_file(change(dict(tensors)), directory / "model.safetensors", metadata={"format": "pt"})


def test_every_system_agrees(config, draft):
    verdicts = {v.system: v for v in check_draft(draft, config)}
    assert list(verdicts) == ["files", "jax", "torch", "z-lab", "specforge", "sglang"]
    assert verdicts["sglang"].status == "not run"  # this target runs in transformers
    assert "backend='sglang'" in verdicts["sglang"].note
    for name in ("torch", "z-lab", "specforge"):
        verdict = verdicts[name]
        assert (verdict.status, verdict.difference) == ("same", ""), verdict
        assert verdict.error < 1e-5
        assert verdict.same_blocks + verdict.near_ties == verdict.blocks == 18  # text, one picture, several
        assert verdict.accept_len == verdicts["jax"].accept_len


def test_the_other_form_in_its_own_class(config, draft, tmp_path):
    tensors, shape = load_draft(draft)
    target = open_target(config.target)
    directory = export_draft(tensors, shape, target.config, tmp_path / "draft", form="speculators")
    verdicts = {v.system: v for v in check_draft(directory, config)}
    assert list(verdicts) == ["files", "jax", "speculators"]
    assert (verdicts["speculators"].status, verdicts["speculators"].difference) == ("same", "")
    assert verdicts["speculators"].error < 1e-5
    assert verdicts["speculators"].accept_len == verdicts["jax"].accept_len
    edit(directory, aux_hidden_state_layer_ids=list(shape.target_layer_ids))  # as if it counted as we do
    verdicts = {v.system: v for v in check_draft(directory, config)}
    assert verdicts["speculators"].difference.startswith("target_layer_ids is")


def faults():
    rope = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return {
        "rope_theta": lambda d: edit(d, **rope),
        "mask_token_id": lambda d: edit(d, mask_token_id=7),
        "target_layer_ids": lambda d: edit(d, target_layer_ids=[0, 2, 3]),
        "block_size": lambda d: edit(d, block_size=5),
        K_NORM: lambda d: rewrite(d, lambda t: {name: x for name, x in t.items() if name != K_NORM}),
        "layers.0.mlp.up_proj.weight": lambda d: rewrite(
            d, lambda t: t | {"layers.0.mlp.up_proj.weight": t["layers.0.mlp.up_proj.weight"][::-1].copy()}
        ),
    }


@pytest.mark.parametrize("name", faults())
def test_a_planted_fault_has_its_name(config, copy, name, monkeypatch, capsys):
    faults()[name](copy)
    monkeypatch.setattr("jaxdraft.cli.load_config", lambda _: config)
    assert check.main(["--draft", str(copy), "--config", "any"]) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if " differs: " in line or " failed: " in line]
    assert named
    assert name in named[0]


def test_the_systems_see_a_fault_by_themselves(config, copy):
    """Not only the files' own row: each system reads config.json, and is compared with what was trained."""
    edit(copy, mask_token_id=7)
    verdicts = {v.system: v for v in check_draft(copy, config)}
    for name in ("torch", "z-lab", "specforge"):
        assert verdicts[name].status == "differs"
        assert verdicts[name].difference.startswith("mask_token_id is 7")
        assert verdicts[name].error > 1e-3  # and it does compute something else


def test_what_is_computed_is_compared_as_well(config, draft, monkeypatch):
    """A system that reads every field right and rotates by another base."""
    from feature_bridge import torch_draft

    real = torch_draft.rope_angles
    monkeypatch.setattr(torch_draft, "rope_angles", lambda n, d, theta, device: real(n, d, 1e4, device))
    verdicts = {v.system: v for v in check_draft(draft, config)}
    assert verdicts["z-lab"].status == "same"
    assert verdicts["torch"].status == "differs"
    assert verdicts["torch"].difference.startswith("hidden of the blocks of text")


def test_a_foreign_draft_is_believed(config, copy):
    (copy / "export.json").unlink()
    files, params, _ = check_directory(copy, open_target(config.target).config)
    assert (files.status, params is None) == ("same", False)
    assert "config.json is believed" in files.note


def test_rope_of_another_target(config, copy):
    """Without a record of the training, the target's own config still tells."""
    (copy / "export.json").unlink()
    faults()["rope_theta"](copy)
    files, params, _ = check_directory(copy, open_target(config.target).config)
    assert params is None
    assert "rope_theta=10000.0" in files.difference


def test_fields_and_digests_mean_the_same_on_both_sides(draft):
    import torch

    from feature_bridge.check import digest as torch_digest

    values = np.random.default_rng(0).normal(size=(5, 7)).astype(jnp.bfloat16)
    assert digest(values) == torch_digest(torch.from_numpy(values.astype(np.float32)).bfloat16())
    _, shape = load_draft(draft)
    fields = config_fields(shape)
    assert list(fields) == list(FIELDS)
    assert field_difference(fields, shape) == ""
    assert "output_multiplier" in field_difference(fields | {"output_multiplier": 0.5}, shape)


def test_blocks_count_as_decoding_does():
    conversation = Conversation("c", np.array([5, 1, 2, 3, 4]), np.zeros((5, 1), np.float32), np.array([0, 2, 3]))
    proposed = np.array([[1, 2, 0], [3, 4, 0], [0, 0, 0]])  # two right; all that there are; none
    logits = np.eye(6)[proposed] + np.eye(6)[(proposed + 1) % 6] * 0.75
    blocks = Blocks(np.zeros((3, 4, 2)), logits)
    assert blocks.accept_lens(conversation).tolist() == [2, 2, 0]
    np.testing.assert_allclose(blocks.gap, 0.25)


def test_one_conversation_of_each_kind():
    kinds = {"text": 1, "one picture": 0, "several pictures": 5, "video": 2}
    assert choose_conversations(np.array([1, 0, 3, 0, 1, 2])) == kinds
    assert choose_conversations(np.array([0, 0])) == {"text": 0}


def test_the_table_says_what_did_not_run():
    console = Console(record=True, width=100, file=io.StringIO())
    print_verdicts(console, "draft", [Verdict(system="z-lab", status="not installed", note="No module named 'dflash'")])
    text = console.export_text()
    assert "not installed" in text
    assert "z-lab: No module named 'dflash'" in text


def test_what_sglangs_server_makes_of_it_has_its_own_line(tmp_path):
    def said(model_type, system="dflash", **fields):
        target = TargetModel(Path("t"), {"model_type": model_type})
        verdicts = of_the_server(tmp_path, SYSTEMS[system], dataclasses.replace(CONFIG, **fields), target)
        assert not any(verdict.failed for verdict in verdicts)
        return [verdict.note for verdict in verdicts]

    (note,) = said("qwen3_vl")
    assert "does not serve this draft with a qwen3_vl target" in note
    assert said("qwen3_5") == said("qwen3_vl", "speculators") == said("qwen3_5", input_embedding_scale=1.0) == []
    (note,) = said("qwen3_5", input_embedding_scale=2.5)
    assert "input_embedding_scale=2.5" in note
    for name in ("model.safetensors", "model_ema.safetensors"):
        (tmp_path / name).touch()
    (note,) = said("qwen3_5")
    assert "loads model_ema.safetensors over model.safetensors" in note


def test_what_is_no_draft_is_said_before_anything_starts(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for directory, said in ((tmp_path, "is the directory of a run; give its export/"), ("no", "has no config.json")):
        with pytest.raises(ValueError, match=said):
            main(["--draft", str(directory), "--config", "tiny_qwen35vl.py"])


def test_sglang_agrees(config, copy):
    """SGLang's own class, in a process of its own: it keeps its state in globals. And its silent fault has a name."""
    program = Path(__file__).with_name("sglang_check.py")
    file = copy.parent / "config.json"
    eval_path, shape = config.data.eval_path, [config.draft.num_layers, config.draft.block_size]
    file.write_text(json.dumps({"eval_path": eval_path, "shape": shape, "draft": str(copy)}))
    result = subprocess.run([sys.executable, str(program), str(file)], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["good"]["status"] == "same", found
    assert found["good"]["error"] < 1e-5
    assert found["missing"] == f"tensor {K_NORM} was never loaded"
    assert found["mask"].startswith("mask_token_id is 7")
    assert found["native"] == [True] * 3  # each load's


# --- during training ------------------------------------------------------------------------------------------------


def planted_in_the_export():
    """Faults of the exporter's own code, as a change of what it writes."""
    real_config, real_tensors = export.hf_config, export.check_tensors

    def writing(**fields):
        def hf_config(*args):
            config = real_config(*args)
            nested = {name: value for name, value in fields.items() if name in config["dflash_config"]}
            return config | fields | {"dflash_config": config["dflash_config"] | nested}

        return "hf_config", hf_config

    rope = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return {
        "rope_theta": writing(**rope),
        "mask_token_id": writing(mask_token_id=7),
        "target_layer_ids": writing(target_layer_ids=[0, 2, 3]),
        K_NORM: ("check_tensors", lambda *args: {n: x for n, x in real_tensors(*args).items() if n != K_NORM}),
        "layers.0.input_layernorm.weight": (
            "check_tensors",
            lambda *args: (t := real_tensors(*args)) | {"layers.0.input_layernorm.weight": t["hidden_norm.weight"]},
        ),
    }


@pytest.fixture(scope="module")
def bridge(config, draft):
    _, shape = load_draft(draft)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_path=None), rows_per_device=1)
    with open_bridge(config, shape.target_layer_ids, log_path=Path(config.output_dir) / "b.log") as bridge:
        yield bridge


def first_checkpoint(config, draft, bridge, restarts=False):
    tensors, shape = load_draft(draft)
    target = open_target(config.target)
    embedding, head = load_frozen(config.target, target, jnp.float32)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, shape.feature_size)).astype(np.float32)
    conversation = Conversation("a sample", rng.integers(0, 99, 30).astype(np.int32), features, np.int32([3, 11, 29]))
    params = {name: jnp.asarray(x, jnp.float32) for name, x in from_tensors(tensors, shape).items()}
    frozen = Frozen(embedding=embedding, head=head)

    def current():
        """A copy, which ends with the bridge's life, as a mapping does."""
        lent.append(jax.tree.map(jnp.copy, frozen))
        return lent[-1]

    lent = []
    if restarts:
        real = bridge.check

        def check(*args):
            answer = real(*args)
            for array in jax.tree.leaves(lent):
                if not array.is_deleted():
                    array.delete()
            return answer

        bridge = SimpleNamespace(check=check)
    return check_first(params, shape, current, [conversation], bridge, target, config.target.dtype)


def test_the_first_checkpoint_is_right(config, draft, bridge):
    assert first_checkpoint(config, draft, bridge).status == "same"


def test_a_bridge_that_starts_again_while_it_checks(config, draft, bridge):
    """The embedding and the head in the first one's memory are gone with it."""
    assert first_checkpoint(config, draft, bridge, restarts=True).status == "same"


@pytest.mark.parametrize("name", planted_in_the_export())
def test_a_wrong_first_checkpoint_is_refused_by_name(config, draft, bridge, name, monkeypatch):
    monkeypatch.setattr(export, *planted_in_the_export()[name])
    with pytest.raises(ValueError, match=f"is not the draft in training: .*{name}"):
        first_checkpoint(config, draft, bridge)


def test_a_run_checks_its_first_checkpoint(tmp_path):
    """The checkpoint is kept, the run ends."""
    fault = "import jaxdraft.export; real = jaxdraft.export.hf_config; jaxdraft.export.hf_config = lambda *a: real(*a)"
    config = write_config(
        write_data(tmp_path), fault + " | {'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 1e4}}"
    )
    code, output = run_training(config)
    assert code == 2, output
    assert "this checkpoint, exported, is not the draft in training: rope_theta is 10000.0" in output
    assert (tmp_path / "runs" / "small" / "checkpoints" / "2").is_dir()

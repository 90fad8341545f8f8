"""A training checkpoint that SpecForge's own manager wrote becomes a draft to start a training from, bit-exact."""

import json

import numpy as np
import pytest
import torch
from draft_helpers import TINY, random_params
from draft_peers import peer_config, zlab_draft

from feature_bridge.specforge_checkpoint import main
from jaxdraft.convert import load_draft
from jaxdraft.model.tensors import to_tensors


@pytest.fixture
def given(tmp_path):
    """A run of SpecForge with two checkpoints, and the draft's config beside it."""
    from specforge.training.checkpoint import CheckpointManager

    manager = CheckpointManager(str(tmp_path / "run"), "the-run")
    params = {}
    for step in (9, 10):
        params = random_params(TINY, step)
        state = zlab_draft(TINY, params).bfloat16().state_dict()
        manager.save({"draft_state_dict": state, "strategy": "dflash", "global_step": step}, step, rank_state={})
    config = peer_config(TINY).to_dict() | {"architectures": ["DFlashDraftModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, params


def convert(directory, *, checkpoint="run"):
    command = ["--checkpoint", str(directory / checkpoint), "--draft-config", str(directory / "config.json")]
    return main([*command, "--output", str(directory / "draft")])


def test_the_latest_checkpoint_bit_for_bit(given):
    directory, params = given
    assert convert(directory) == 0
    tensors, config = load_draft(directory / "draft")
    assert config.target_layer_ids == TINY.target_layer_ids
    assert (config.mask_token_id, config.block_size) == (TINY.mask_token_id, TINY.block_size)
    for name, expected in to_tensors(params, TINY).items():
        expected = torch.from_numpy(np.array(expected)).bfloat16().view(torch.int16).numpy()
        np.testing.assert_array_equal(tensors[name].view(np.int16), expected, err_msg=name)


def test_mistakes_are_one_sentence(given, capsys):
    directory, _ = given
    assert convert(directory, checkpoint="nowhere") == 2
    assert "holds no training_state.pt" in capsys.readouterr().err
    config = json.loads((directory / "config.json").read_text())
    deeper = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps(config | deeper))
    assert convert(directory) == 2
    assert "e.g. layers.2" in capsys.readouterr().err
    assert not (directory / "draft").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dflash_config": {"mask_token_id": None, "target_layer_ids": [0]}}, "mask_token_id is missing"),
        ({"dflash_config": {"mask_token_id": 1}}, "target_layer_ids is missing"),
        ({"num_attention_heads": None, "head_dim": None}, "has a field of the wrong type"),
    ],
)
def test_a_config_without_what_the_training_found_elsewhere(change, said, given, capsys):
    """SpecForge's own configs leave the mask token to the tokenizer."""
    directory, _ = given
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    assert convert(directory) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no pickle"])
def test_a_checkpoint_that_is_not_whole(damage, given, capsys):
    directory, _ = given
    file = directory / "run" / "the-run-step10" / "training_state.pt"
    file.write_bytes(damage(file.read_bytes()))
    assert convert(directory) == 2
    assert f"cannot read {file}, which may be cut off" in capsys.readouterr().err


def test_checkpoints_of_several_runs(given, capsys):
    directory, _ = given
    (directory / "run" / "the-run-step9").rename(directory / "run" / "another-step9")
    assert convert(directory) == 2
    assert "holds several runs (another, the-run)" in capsys.readouterr().err

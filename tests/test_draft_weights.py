"""Which files hold a draft's weights: both readers, against z-lab's class, which loads as transformers does."""

import json

import numpy as np
import pytest
import torch
from draft_configs import full
from safetensors.torch import save_file

from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.model_files import INDEX, unread_weights
from feature_bridge.torch_draft import TorchDraft, weight_names
from jaxdraft.convert import load_draft

torchvision_ops.ensure()  # transformers' Qwen3 imports its image code

from dflash.model import DFlashDraftModel  # noqa: E402
from transformers import Qwen3Config  # noqa: E402

FC, NORM = "fc.weight", "norm.weight"


@pytest.fixture(scope="module")
def weights():
    """Of two drafts: the right one's and another's."""

    def random(seed):
        torch.manual_seed(seed)
        model = DFlashDraftModel(Qwen3Config(**full({})))
        return {name: torch.randn_like(weight) for name, weight in model.state_dict().items() if "rotary" not in name}

    return random(0), random(1)


def write(directory, index=None, **files):
    (directory / "config.json").write_text(json.dumps(full({})))
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})
    if index is not None:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def halves(weights):
    names = sorted(weights)
    parts = [{name: weights[name] for name in part} for part in (names[:9], names[9:])]
    return parts, {name: f"part{i}.safetensors" for i, part in enumerate(parts) for name in part}


def agree(directory, expected):
    peer = DFlashDraftModel.from_pretrained(directory, dtype=torch.float32).state_dict()
    ours, bridge = load_draft(directory)[0], TorchDraft.load(directory, dtype=torch.float32).weights
    assert set(ours) == set(bridge) == set(weight_names(3))
    for name, weight in expected.items():
        for found in (peer[name], bridge[name], torch.from_numpy(np.array(ours[name]))):
            assert torch.equal(found, weight), name


def test_another_file_beside_the_weights_is_not_read(tmp_path, weights):
    write(tmp_path, model=weights[0], model_ema=weights[1])
    agree(tmp_path, weights[0])
    assert unread_weights(tmp_path) == ["model_ema.safetensors"]


def test_the_index_is_followed(tmp_path, weights):
    parts, index = halves(weights[0])
    write(tmp_path, index, part0=parts[0], part1=parts[1], zz_old=weights[1])
    agree(tmp_path, weights[0])
    assert unread_weights(tmp_path) == []


def test_an_index_of_the_one_file(tmp_path, weights):
    write(tmp_path, dict.fromkeys(weights[0], "model.safetensors"), model=weights[0], model_ema=weights[1])
    agree(tmp_path, weights[0])


def test_names_with_a_prefix(tmp_path, weights):
    write(tmp_path, model={f"model.{name}": weight for name, weight in weights[0].items()})
    agree(tmp_path, weights[0])


def refused(directory, named):
    for load in (load_draft, lambda d: TorchDraft.load(d, dtype=torch.float32)):
        with pytest.raises(ValueError, match=named):
            load(directory)


def test_what_is_ambiguous_is_refused(tmp_path, weights):
    right, other = weights
    parts, index = halves(right)
    cases = {
        "fc.weight twice": {"model": {**right, f"model.{FC}": other[FC]}},
        "norm.weight twice": {
            "index": index, "part0": parts[0] | {NORM: other[NORM]}, "part1": parts[1],
        },
        "has no model.safetensors; rename the right one of model_ema.safetensors": {"model_ema": right},
        "has no model.safetensors; give an exported": {},
        "names part1.safetensors, which is not there": {"index": index, "part0": parts[0]},
        "says that part1.safetensors has fc.weight, which it has not": {
            "index": index | {FC: "part1.safetensors"}, "part0": parts[0], "part1": parts[1],
        },
        "has model.safetensors and an index of other files": {
            "index": index, "part0": parts[0], "part1": parts[1], "model": right,
        },
        "has no weight_map": {"index": {}, "model": right},
    }  # fmt: skip
    for i, (named, files) in enumerate(cases.items()):
        directory = tmp_path / str(i)
        directory.mkdir()
        write(directory, **files)
        refused(directory, named)

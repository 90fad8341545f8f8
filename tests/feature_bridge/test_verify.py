"""`bridge.verify`: a target that computes something else than transformers is refused, though its layers are right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from tiny_models import make_model

from feature_bridge.contracts import TargetSpec
from feature_bridge.targets.base import Extended
from feature_bridge.targets.huggingface import HuggingFaceTarget
from feature_bridge.targets.probe import check_layer_contract
from feature_bridge.targets.verify import check_against, reference_states


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model("qwen3_vl", tmp_path_factory.mktemp("models"))


def spec_of(path):
    return TargetSpec(path=str(path), layer_ids=(0, 2), dtype="float32")


@pytest.fixture(scope="module")
def reference(path):
    return reference_states(spec_of(path), path, 512)


@pytest.mark.parametrize("capture", ["layer_output", "next_layer_input"])
def test_its_own_meaning_is_compared(capture, path, reference):
    target = HuggingFaceTarget(spec_of(path), path, max_tokens=512, capture=capture)
    assert check_against(target, reference, "float32") == {"text": 0.0, "pictures": 0.0}
    other = {"layer_output": "next_layer_input", "next_layer_input": "layer_output"}[capture]
    target.info = dataclasses.replace(target.info, capture=other)
    with pytest.raises(ValueError, match="captured layer 0 of pictures is"):
        check_against(target, reference, "float32")


class Displaced(HuggingFaceTarget):
    """Every picture's positions are those of text: the layer contract sees nothing."""

    def _inputs(self, request):
        inputs = super()._inputs(request)
        return inputs | {"position_ids": torch.arange(len(request.tokens)).expand(3, 1, -1)}


def test_wrong_positions_are_seen(path, reference):
    target = Displaced(spec_of(path), path, max_tokens=512)
    assert check_layer_contract(target, "layer_output") == "layer_output"
    with pytest.raises(ValueError, match=r"captured layer \d of (text|pictures) is .* away from that of huggingface"):
        check_against(target, reference, "float32")


def test_nan_is_no_small_error(path, reference):
    target = HuggingFaceTarget(spec_of(path), path, max_tokens=512)
    extend = target.extend
    target.extend = lambda requests: Extended(extend(requests).features * torch.nan, None)
    with pytest.raises(ValueError, match="captured layer 0 of text is nan%"):
        check_against(target, reference, "float32")


def test_what_transformers_cannot_load(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    with pytest.raises(ValueError, match=r"bridge\.verify: transformers cannot load the target .*; set it to false"):
        reference_states(spec_of(tmp_path), tmp_path, 512)


def test_sglang_beside_transformers(path):
    """The whole of it, in a process of its own as the bridge's."""
    script = f"""
from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.targets import load_target
target = TargetSpec(path={str(path)!r}, layer_ids=(0, 1), dtype="float32", backend="sglang", verify=True)
data = DataSpec(train_path=None, max_length=64, min_supervised=2)
load_target(BridgeSpec(target=target, data=data, rows_per_slot=1, row_tokens=64, num_slots=2, feature_dtype="float32",
            transport="shared_memory"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "bridge.verify: relative error of sglang" in run.stdout

"""The layer contract: every way to hand over wrong features is refused, and the layer is named."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model

from feature_bridge.contracts import TargetSpec
from feature_bridge.targets.base import Extended
from feature_bridge.targets.huggingface import HuggingFaceTarget
from feature_bridge.targets.probe import check_layer_contract


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {family: make_model(family, directory) for family in ("qwen3", "qwen3_vl")}


@pytest.fixture(scope="module", params=["qwen3", "qwen3_vl"])
def target(request, paths):
    return load(paths[request.param], (0, 1, 2))


@pytest.fixture(scope="module")
def vlm(paths):
    return load(paths["qwen3_vl"], (0, 1, 2))


def load(path, layer_ids, capture="layer_output"):
    spec = TargetSpec(path=str(path), layer_ids=layer_ids, dtype="float32")
    return HuggingFaceTarget(spec, path, max_tokens=512, capture=capture)


class Tampered:
    """A target whose features go through `change(features, call)`."""

    def __init__(self, target, change, **attributes):
        self._target, self._change, self._calls = target, change, 0
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        return getattr(self._target, name)

    def extend(self, requests, *, last_hidden=False):
        self._calls += 1
        return Extended(self._change(self._target.extend(requests).features.clone(), self._calls), None)


def layers(features):
    return list(features.chunk(3, dim=-1))


def test_a_true_capture_passes(target):
    assert check_layer_contract(target, "layer_output") == "layer_output"


def test_shift_by_one_layer(paths):
    shifted = Tampered(load(paths["qwen3"], (0, 1)), lambda features, _: features, layer_ids=(1, 2))
    with pytest.raises(
        ValueError, match="captured layer 1 equals the output of layer 0, and not the output of layer 1"
    ):
        check_layer_contract(shifted, "layer_output")


def test_swapped_layers(target):
    swapped = Tampered(target, lambda features, _: torch.cat([layers(features)[i] for i in (0, 2, 1)], dim=-1))
    with pytest.raises(ValueError, match="captured layer 1 equals the output of layer 2"):
        check_layer_contract(swapped, "layer_output")


def test_a_layer_twice(target):
    twice = Tampered(target, lambda features, _: torch.cat([layers(features)[i] for i in (0, 1, 1)], dim=-1))
    with pytest.raises(ValueError, match="captured layer 2 equals captured layer 1"):
        check_layer_contract(twice, "layer_output")


def set_values(value, layer, rows=slice(None)):
    def change(features, _):
        layers(features)[layer][rows] = value
        return features

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_values(0, 1), "captured layer 1 is zero for 100% of the tokens"),
        (set_values(0, 2, slice(0, 1)), "captured layer 2 is zero for"),
        (set_values(torch.nan, 0, slice(3, 4)), "captured layer 0 has NaN or infinite values"),
        (set_values(-torch.inf, 2), "captured layer 2 has NaN or infinite values"),
        (lambda features, _: features[:-1], "gave features of shape"),
        (lambda features, _: features[:, :-1], "gave features of shape"),
        (lambda features, _: features * 1.001, "captured layer 0 is not the output of layer 0"),
    ],
)
def test_wrong_values(change, message, target):
    with pytest.raises(ValueError, match=message) as error:
        check_layer_contract(Tampered(target, change), "layer_output")
    assert target.info.backend in str(error.value)
    assert "\n" not in str(error.value)


def test_stale_picture(vlm):
    """A second picture that is given the first one's embedding."""
    kept = []

    def first_ones(features, _):
        kept.append(features)
        return kept[0]

    with pytest.raises(ValueError, match="do not depend on the picture"):
        check_layer_contract(Tampered(vlm, first_ones), "layer_output")


def test_features_that_change_by_themselves(vlm):
    with pytest.raises(ValueError, match="gave other features the second time"):
        check_layer_contract(Tampered(vlm, lambda features, call: features * (1 + (call == 3))), "layer_output")


def test_deepstack_meanings_are_told_apart(paths, vlm):
    next_input = load(paths["qwen3_vl"], (0, 1, 2), "next_layer_input")
    assert check_layer_contract(next_input, "next_layer_input") == "next_layer_input"
    assert check_layer_contract(next_input, None) == "next_layer_input"
    assert check_layer_contract(vlm, None) == "layer_output"
    with pytest.raises(ValueError, match="captured layer 0 equals the input of layer 1, and not the output of layer 0"):
        check_layer_contract(next_input, "layer_output")


def test_hooks_are_gone_afterwards(target):
    check_layer_contract(target, "layer_output")
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in target.layers)

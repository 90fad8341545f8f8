"""Run SGLang on a model in a process of its own, since it keeps its state in globals, and save what it captures.

python sglang_capture.py MODEL_DIR LAYER_IDS DTYPE OUT.safetensors
"""

from __future__ import annotations

import json
import sys
import unittest.mock
from collections.abc import Callable
from typing import Any

import target_requests
import torch
from safetensors.torch import save_file

from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.targets import load_target, sglang_visuals
from feature_bridge.targets import sglang_versions as versions
from feature_bridge.targets.base import Extended, Request
from feature_bridge.targets.probe import check_layer_contract


def spec_of(path: str, layer_ids: tuple[int, ...], **target: Any) -> BridgeSpec:
    return BridgeSpec(
        target=TargetSpec(path=path, layer_ids=layer_ids, **target),
        data=DataSpec(train_path=None, max_length=256, min_supervised=1),
        rows_per_slot=1,
        row_tokens=512,
    )


class Tampered:
    """A target whose features go through `change`."""

    def __init__(self, target: Any, change: Callable[[Any], Any]):
        self._target, self._change = target, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def extend(self, requests: list[Request], *, last_hidden: bool = False) -> Extended:
        output = self._target.extend(requests, last_hidden=last_hidden)
        return Extended(self._change(output.features), output.hidden)


def message(call: Callable[[], Any]) -> str:
    """The ValueError's text; no error fails the test that reads it."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(path: str, layer_ids: str, dtype: str, out: str) -> None:
    ids = tuple(int(l) for l in layer_ids.split(","))
    target: Any = load_target(spec_of(path, ids, backend="sglang", dtype=dtype))
    config, width = target.config, target.info.hidden_size
    tensors, messages, tower_runs = {}, {}, {}

    named = target_requests.batches(config)
    for name, requests in named.items():
        output = target.extend(requests, last_hidden=True)
        tensors[f"{name}/features"] = output.features
        tensors[f"{name}/hidden"] = output.hidden
        tensors[f"{name}/logits"] = target.logits(output.hidden)
    whole = "mixed" if "mixed" in named else "texts"
    for i, request in enumerate(named[whole]):
        tensors[f"{whole} alone {i}/features"] = target.extend([request]).features
    many = [target_requests.text(config, 9, seed) for seed in range(40)]  # more than one extend takes
    tensors["many/features"] = target.extend(many).features
    tensors["embedding/rows"] = target.embed([3, 1, 2])
    tensors |= {f"frozen/{name}": matrix.clone() for name, matrix in target.frozen().items()}

    def swapped(features: Any) -> Any:
        first, second, *rest = features.split(width, dim=-1)
        return torch.cat([second, first, *rest], dim=-1)

    if getattr(config, "vision_config", None) is not None:
        grids = [[(1, 16, 20)], [(1, 8, 4)], [(1, 4, 4), (1, 10, 6)], [(1, 2, 2)]]
        row = [target_requests.pictures(config, some, seed) for seed, some in enumerate(grids)]
        tower = target._towers["image"]
        get_feature = tower._get_feature
        for cache, before in (("cold", []), ("warm", row)):  # warm: every picture was seen, in other company
            runs: list[int] = []
            tower_runs[cache] = runs
            tower._get_feature = lambda items, runs=runs: runs.append(len(items)) or get_feature(items)
            versions.start_embedding_cache(64 << 20)
            for request in before:
                target.extend([request])
            tensors[f"{cache} cache/features"] = target.extend(row).features
        tower._get_feature = get_feature
        ahead = [target.prepare(request) for request in row]
        with unittest.mock.patch.object(sglang_visuals, "find", side_effect=AssertionError("computed again")):
            for _ in range(2):  # SGLang writes into what it is given
                tensors["prepared ahead/features"] = target.extend(ahead).features

    target.tokens_multiple = 64  # as on a GPU
    for name, requests in named.items():
        output = target.extend(requests, last_hidden=True)
        tensors[f"{name} filled up/features"], tensors[f"{name} filled up/hidden"] = output.features, output.hidden
    check_layer_contract(target, target.info.capture)
    target.tokens_multiple = 1

    messages["shifted"] = message(lambda: check_layer_contract(Tampered(target, swapped), target.info.capture))
    if getattr(config, "vision_config", None) is not None:
        bad = target_requests.pictures(config, [(1, 4, 6)], 9)
        wrong_grid = Request(tokens=bad.tokens, pixel_values=bad.pixel_values, image_grids=((1, 4, 4),))
        messages["wrong grid"] = message(lambda: target.extend([wrong_grid]))
    messages["too long"] = message(lambda: target.extend([target_requests.text(config, 2000, 1)]))
    messages["unknown argument"] = message(lambda: versions.server_args({}, {"max_total_tokns": 1}))
    tensors["after errors/features"] = target.extend(named["texts"]).features

    facts = {"info": vars(target.info), "setter": target.setter, "messages": messages, "tower runs": tower_runs}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, {"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])

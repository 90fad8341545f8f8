"""The layer contract, checked before a run: captured features are what the target's own layers give.

A capture that is shifted by a layer, zero, or blind to pictures raises no error: the draft is only bad. So a small
batch (a text, and a picture if the target takes pictures) is captured while forward hooks watch every layer.

Once, at start: a shifted layer and a lost picture are faults of the code, which all batches share. What one batch can
have by itself, zeros, infinite values and a wrong length, is looked for in every row (`feature_checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_bridge.targets.base import (
    Capture,
    Grid,
    LayerStates,
    Request,
    Target,
    check_request,
    join,
    patch_dim,
    placeholder_ids,
    text_config,
)

TEXT_TOKENS = 37
# Of one value, relative: a few units in the last place. Most values of two different layers are further apart; a norm
# over all of them would not tell, since a few huge values of some tokens pass through most layers unchanged.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
SAME_SHARE = 0.999


def check_layer_contract(target: Target, declared: Capture | None) -> Capture:
    """Capture a probe batch and compare it with forward hooks on the target's layers.

    `declared` is what a captured state is said to be; None accepts whichever it is. Returns which it is.

    Raises:
      ValueError: one sentence that names the layer, if a captured layer is not what was asked for.
    """
    requests = probe_requests(target, seed=0)
    below_last = range(target.info.num_layers - 1)
    with (
        LayerStates(target.layers, below_last, "layer_output", target.state_of) as outputs,
        LayerStates(target.layers, below_last, "next_layer_input", target.state_of) as inputs,
    ):
        features = target.extend(requests).features
    num_tokens, width = sum(len(request.tokens) for request in requests), target.info.hidden_size
    if tuple(features.shape) != (num_tokens, len(target.layer_ids) * width):
        raise ValueError(
            f"{num_tokens} probe tokens gave features of shape {tuple(features.shape)}, expected "
            f"{(num_tokens, len(target.layer_ids) * width)}{_remedy(target)}"
        )
    captured = dict(zip(target.layer_ids, features.split(width, dim=-1), strict=True))
    _check_values(captured, target)
    states = {  # a target may fill the batch up at its end
        "layer_output": {l: join(parts)[:num_tokens] for l, parts in outputs.states.items()},
        "next_layer_input": {l: join(parts)[:num_tokens] for l, parts in inputs.states.items()},
    }
    meanings: tuple[Capture, ...] = ("layer_output", "next_layer_input") if declared is None else (declared,)
    for meaning in meanings:
        if all(_same(state, states[meaning][l]) for l, state in captured.items()):
            _check_pictures(target, requests, features)
            return meaning
    raise ValueError(_mismatch(captured, states, meanings[-1]) + _remedy(target))


def probe_requests(target: Target, seed: int) -> list[Request]:
    """A text, and for a target that sees a text with a picture; the same text for every seed, another picture."""
    config, rng = target.config, np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(min(text_config(config).vocab_size, 50_000)), list(placeholder_ids(config)))
    requests = [Request(tokens=rng.choice(ordinary, TEXT_TOKENS).astype(np.int32))]
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        grid = Grid(1, 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size)
        placeholders = [config.image_token_id] * (grid.num_patches // vision.spatial_merge_size**2)
        before, after = rng.choice(ordinary, 5), rng.choice(ordinary, 9)
        tokens = [*before, config.vision_start_token_id, *placeholders, config.vision_end_token_id, *after]
        pixels = np.random.default_rng(seed).uniform(-1, 1, (grid.num_patches, patch_dim(vision)))
        picture = torch.from_numpy(pixels.astype(np.float32))
        requests.append(Request(tokens=np.array(tokens, np.int32), pixel_values=picture, image_grids=(grid,)))
    return requests


def placeholder_mask(requests: Sequence[Request], config: Any) -> np.ndarray:
    """Which tokens of a batch stand for pictures or videos, [n] bool."""
    return np.isin(np.concatenate([request.tokens for request in requests]), list(placeholder_ids(config)))


def _check_values(captured: dict[int, Tensor], target: Target) -> None:
    previous: tuple[int, Tensor] | None = None
    for l, state in captured.items():
        if not torch.isfinite(state).all():
            raise ValueError(f"captured layer {l} has NaN or infinite values{_remedy(target)}")
        if (state == 0).all(dim=-1).any():
            raise ValueError(f"captured layer {l} is zero for {_zero_share(state)} of the tokens{_remedy(target)}")
        if previous is not None and _same(state, previous[1]):
            raise ValueError(f"captured layer {l} equals captured layer {previous[0]}{_remedy(target)}")
        previous = (l, state)


def _check_pictures(target: Target, requests: list[Request], features: Tensor) -> None:
    """Another picture must give other features, and the first picture again the same ones."""
    if len(requests) == 1:
        return
    others = probe_requests(target, seed=1)
    spans, offset = check_request(requests[1], target.config, target.max_tokens), len(requests[0].tokens)
    start, end = spans.pictures[0]
    other = target.extend(others).features
    if _same(other[offset + start : offset + end], features[offset + start : offset + end]):
        raise ValueError(f"features of image tokens do not depend on the picture{_remedy(target)}")
    if not _same(target.extend(requests).features, features):
        raise ValueError(f"the same probe batch gave other features the second time{_remedy(target)}")


def _mismatch(captured: dict[int, Tensor], states: dict[Capture, dict[int, Tensor]], meaning: Capture) -> str:
    for l, state in captured.items():
        if _same(state, states[meaning][l]):
            continue
        wanted = {"layer_output": f"the output of layer {l}", "next_layer_input": f"the input of layer {l + 1}"}
        for other, name in (("layer_output", "the output of layer {}"), ("next_layer_input", "the input of layer {}")):
            for m, candidate in states[other].items():
                if _same(state, candidate):
                    found = name.format(m if other == "layer_output" else m + 1)
                    return f"captured layer {l} equals {found}, and not {wanted[meaning]}"
        share = 1 - _equal_share(state, states[meaning][l])
        return f"captured layer {l} is not {wanted[meaning]} ({share:.1%} of the values differ)"
    raise AssertionError("called without a mismatch")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _equal_share(a, b) >= SAME_SHARE


def _equal_share(a: Tensor, b: Tensor) -> float:
    return float(torch.isclose(a.float(), b.float(), rtol=TOLERANCE[a.dtype], atol=1e-6).float().mean())


def _zero_share(state: Tensor) -> str:
    return f"{float((state == 0).all(dim=-1).float().mean()):.0%}"


def _remedy(target: Target) -> str:
    return f"; {target.info.backend} cannot be used for this target: try another version, or another target.backend"

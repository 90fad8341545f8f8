"""`bridge.verify`: SGLang's features of the probe batch beside transformers' own.

The layer contract (`probe`) compares a capture with the target's own layers. What these compute can be wrong as well:
the positions of a picture, a vision tower, a scale of RoPE. transformers is loaded first and leaves the GPU again.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from feature_bridge.contracts import TargetSpec
from feature_bridge.model_files import first_line
from feature_bridge.targets.base import Capture, LayerStates, Request, Target, join
from feature_bridge.targets.huggingface import HuggingFaceTarget
from feature_bridge.targets.probe import placeholder_mask, probe_requests

# Mean over the tokens of |difference| / |state|. Other kernels round otherwise, and layers pass it on.
LIMIT = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers' states of the probe batch, on the host, by either meaning of a captured layer."""

    backend: str
    requests: Sequence[Request]
    states: dict[Capture, dict[int, Tensor]]


def reference_states(spec: TargetSpec, directory: Path, max_tokens: int) -> Reference:
    """Load the target in transformers, run the probe batch, free it.

    Raises:
      ValueError: transformers cannot run it.
    """
    try:
        target = HuggingFaceTarget(spec, directory, max_tokens=max_tokens)
    except (ValueError, KeyError, ImportError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"bridge.verify: transformers cannot load the target ({first_line(error)}); set it to false"
        ) from error
    requests = probe_requests(target, seed=0)
    with (
        LayerStates(target.layers, spec.layer_ids, "layer_output", target.state_of) as outputs,
        LayerStates(target.layers, spec.layer_ids, "next_layer_input", target.state_of) as inputs,
    ):
        target.extend(requests)
    states: dict[Capture, dict[int, Tensor]] = {
        "layer_output": {l: join(parts).cpu() for l, parts in outputs.states.items()},
        "next_layer_input": {l: join(parts).cpu() for l, parts in inputs.states.items()},
    }
    backend = target.info.backend
    del target, outputs, inputs
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Reference(backend=backend, requests=requests, states=states)


def check_against(target: Target, reference: Reference, dtype: str) -> dict[str, float]:
    """The target's features of the probe batch beside the reference's: {"text", "pictures": largest error of a layer}.

    Raises:
      ValueError: an error above `LIMIT`; names the layer and the kind of tokens.
    """
    features = target.extend(reference.requests).features.cpu()
    visual = torch.from_numpy(placeholder_mask(reference.requests, target.config))
    worst: dict[str, float] = {}
    captured = features.split(target.info.hidden_size, dim=-1)
    for l, state in zip(target.layer_ids, captured, strict=True):
        errors = _relative_errors(state, reference.states[target.info.capture][l])
        for kind, tokens in (("text", ~visual), ("pictures", visual)):
            if not tokens.any():
                continue
            error = float(errors[tokens].mean())
            if not error <= LIMIT[dtype]:
                raise ValueError(
                    f"captured layer {l} of {kind} is {error:.1%} away from that of {reference.backend}, more than "
                    f"{LIMIT[dtype]:.1%}; {target.info.backend} computes this target differently: try another version, "
                    "or target.backend='huggingface'"
                )
            worst[kind] = max(error, worst.get(kind, 0.0))
    return worst


def _relative_errors(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| of each token, [n]."""
    a, b = a.float(), b.float()
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)

"""The frozen targets behind one protocol: `load_target(spec)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_bridge.contracts import BridgeSpec, TargetSpec
from feature_bridge.model_files import find_model, open_tensors, read_config, tensor_files, text_config
from feature_bridge.targets import sglang_versions
from feature_bridge.targets.base import Target, check_layer_ids
from feature_bridge.targets.probe import check_layer_contract, probe_requests

_FLOATS = ("F64", "F32", "F16", "BF16")
_FROZEN_MODULES = ("embed_tokens", "lm_head")  # the trainer reads them as plain matrices


def load_target(spec: BridgeSpec, *, memory_budget: int | None = None) -> Target:
    """The target that `spec` asks for, its layer contract checked; by transformers too if `spec.target.verify`.

    Args:
      spec: of the bridge.
      memory_budget: bytes of the GPU that SGLang may take; None: half of what is free.

    Raises:
      ValueError: no such model, layers that cannot be captured, a quantised embedding or head, samples longer than the
        target's context, or features that are not what was asked for.
    """
    directory = resolve_directory(spec.target)
    _check_model(spec, directory)
    max_tokens = spec.row_tokens + spec.data.max_length  # a row, or a sample and what is decoded after it
    backend, reference = _choose_backend(spec.target.backend), None
    if backend == "sglang":
        from feature_bridge.targets.verify import check_against, reference_states

        if spec.target.verify and spec.rank.index == 0:
            reference = reference_states(spec.target, directory, max_tokens)
        target = _load_sglang(spec, directory, max_tokens, memory_budget)
        declared = target.info.capture if target.capture_is_known else None
    else:
        target = _load_huggingface(spec, directory, max_tokens)
        declared = target.info.capture
    if target.max_tokens < spec.data.max_length:
        raise ValueError(
            f"the target takes {target.max_tokens} tokens at once, fewer than data.row_tokens={spec.data.max_length}; "
            "raise bridge.memory_fraction, lower data.row_tokens, or take context_length and max_total_tokens out of "
            "bridge.sglang_args"
        )
    target.info = replace(target.info, capture=check_layer_contract(target, declared))
    if reference is not None:
        errors = check_against(target, reference, spec.target.dtype)
        shown = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
        print(f"bridge.verify: relative error of {target.info.backend} to {reference.backend}: {shown}", flush=True)
    elif spec.target.verify and backend == "sglang":
        target.extend(probe_requests(target, seed=0))  # rank 0 compares; all ranks have to run what it runs
    if backend == "sglang" and spec.target.cuda_graphs:
        target.use_graphs()  # from here on: the checks above hook the layers, and a graph runs no hooks
    return target


def _check_model(spec: BridgeSpec, directory: Path) -> None:
    """Raises ValueError, as `load_target`, for what the model's files alone show to be impossible."""
    text = read_text_config(directory)
    check_layer_ids(spec.target.layer_ids, text["num_hidden_layers"])
    check_not_quantised(directory)
    context = text.get("max_position_embeddings")
    if context is not None and spec.data.max_length > context:
        raise ValueError(
            f"data.row_tokens={spec.data.max_length} is longer than the target's context of {context} tokens; lower it"
        )


def _choose_backend(wanted: str) -> str:
    """ "sglang" or "huggingface". Raises ValueError: SGLang is wanted and not installed."""
    installed = sglang_versions.installed_version() is not None
    if wanted == "auto":
        wanted = "sglang" if installed else "huggingface"
        print(f"target.backend=auto: {wanted} ({'installed' if installed else 'SGLang is not installed'})", flush=True)
    if wanted == "sglang" and not installed:
        raise ValueError(
            "target.backend='sglang' but SGLang is not installed in the bridge's Python; "
            "install it or use 'huggingface'"
        )
    return wanted


def _load_sglang(spec: BridgeSpec, directory: Path, max_tokens: int, memory_budget: int | None) -> Any:
    from feature_bridge.targets.sglang import SGLangTarget

    try:
        return SGLangTarget(spec.target, directory, max_tokens=max_tokens, memory_budget=memory_budget, rank=spec.rank)
    except ValueError as error:
        first, *more = str(error).split("\n")
        if not more:  # our own sentence, or one of SGLang's that is as short
            raise
        version = sglang_versions.installed_version()
        raise ValueError(f"target.path={spec.target.path!r} in SGLang {version}: {first}") from error


def _load_huggingface(spec: BridgeSpec, directory: Path, max_tokens: int) -> Any:
    if spec.rank.count > 1:
        raise ValueError(
            f"bridge.tensor_parallel={spec.rank.count} needs SGLang and the target runs in transformers; "
            "set target.backend='sglang', or bridge.tensor_parallel=1"
        )
    from feature_bridge.targets.huggingface import HuggingFaceTarget

    return HuggingFaceTarget(spec.target, directory, max_tokens=max_tokens)


def resolve_directory(spec: TargetSpec) -> Path:
    """The local directory of the model, downloaded first where `path` is a hub id. Raises ValueError: it is nowhere."""
    return find_model(spec.path, spec.revision, weights=True)


def check_not_quantised(directory: Path) -> None:
    """Raises ValueError if the embedding or the LM head is stored as anything but one matrix of floats.

    Every file is opened: one that is missing or cut off is named here.
    """
    for file in tensor_files(directory):
        with open_tensors(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                *_, module, parameter = ("", *name.split("."))
                if module not in _FROZEN_MODULES:
                    continue
                dtype = tensors.get_slice(name).get_dtype()
                if parameter != "weight" or dtype not in _FLOATS:
                    raise ValueError(
                        f"target.path={str(directory)!r} has a quantised {module} ({name}, {dtype}), which the draft "
                        f"cannot share; use a checkpoint that keeps {' and '.join(_FROZEN_MODULES)} in floating point"
                    )


def read_text_config(directory: Path) -> Mapping[str, Any]:
    """The language model's part of config.json."""
    return text_config(read_config(directory))

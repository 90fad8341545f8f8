"""A trained draft as public software loads it: `python -m jaxdraft.export --checkpoint RUN --output DIR`.

The directory holds `model.safetensors` and `config.json` in the form that z-lab, SpecForge, SGLang and vLLM read,
`dflash.py`, the model in PyTorch, `README.md`, its card, and `export.json`: where it came from, and hashes. Engines
load what they find and say nothing of what is missing, and a draft with a wrong tensor only accepts less, so everything
is checked here, before the directory gets its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
from safetensors.numpy import save_file

from feature_bridge.model_files import config_field, find_model, read_config, read_json, rope_theta, text_config
from jaxdraft import __version__
from jaxdraft.checkpoint import Checkpoints, load_params
from jaxdraft.cli import parse_options, run_command
from jaxdraft.curves import curves_svg, read_metrics
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import tensor_table, to_tensors
from jaxdraft.model_card import model_card
from jaxdraft.speculators import to_speculators

Tensors = Mapping[str, np.ndarray]
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
EXPORT_FORMAT = 1
SCALARS = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")  # of newer configs
Form = Literal["dflash", "speculators"]


def export_draft(
    tensors: Tensors,
    config: DraftConfig,
    target: Mapping[str, Any],
    directory: str | Path,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    form: Form = "dflash",
    capture: str = "layer_output",
    provenance: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a draft's directory, whole or not at all; an earlier export there is replaced.

    Args:
      tensors: by exported name, `[out, in]`, see `jaxdraft.model.tensors.to_tensors`.
      config: the draft's shape.
      target: the target's config.json.
      directory: the one to write; its parent is created.
      dtype: of the written tensors.
      form: of config.json; "speculators" is vLLM's.
      capture: what a feature is, "layer_output" or "next_layer_input"; the serving engine has to mean the same.
      provenance: more for `export.json`, for example the run and the step.
      card: more for the model card, see `write_card`.

    Raises:
      ValueError: a tensor is missing, extra, misshapen, not finite or constant; the draft does not fit the target; or
        the directory holds something else. Nothing is written then.
    """
    directory = Path(directory)
    if directory.is_symlink() or not directory.name:  # "." and links: the directory itself is what gets replaced
        directory = directory.resolve()
    check_target(config, target)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output {directory} is a file; give a directory")
    written = check_tensors(tensors, config, dtype)
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "export.json").is_file():
        raise ValueError(f"--output {directory} is not empty and holds no earlier export; give another directory")

    unfinished = directory.parent / f".{directory.name}.writing-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        why = error.strerror
        raise ValueError(f"--output {directory} cannot be written ({why}); give another directory") from error
    try:
        # "pt" is what transformers insists on; it says nothing about the bytes.
        save_file(written, unfinished / "model.safetensors", metadata={"format": "pt"})
        served = hf_config(config, target, dtype)
        if form == "speculators":
            served = to_speculators(config, served, target, (provenance or {}).get("target"))
        else:
            shutil.copy(modeling_file(), unfinished / "dflash.py")
        _write_json(unfinished / "config.json", served)
        about = {
            "format": EXPORT_FORMAT,
            "form": form,
            "jaxdraft": __version__,
            "capture": capture,
            "target_model_type": target.get("model_type"),
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "draft": dataclasses.asdict(config),
            "tensors": {name: digest(tensor) for name, tensor in written.items()},
            "sha256": {file.name: _sha256(file) for file in sorted(unfinished.iterdir())},
            **(provenance or {}),
        }
        _write_json(unfinished / "export.json", about)
        write_card(unfinished, config, **(card or {}))
        _put_in_place(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def modeling_file() -> Path:
    """The PyTorch model that `auto_map` names. It imports torch: so it is the bridge's, and only copied here."""
    package = importlib.util.find_spec("feature_bridge")
    assert package is not None, "both packages are one distribution"
    (directory,) = package.submodule_search_locations or ()
    return Path(directory) / "remote_code" / "dflash.py"


def write_card(
    directory: str | Path, config: DraftConfig, *, metrics: Sequence[dict[str, Any]] = (), **card: Any
) -> None:
    """Write an export's README.md, and curves.svg where `metrics` (lines of metrics.jsonl) make curves.

    The rest is of `model_card.model_card`: `recipe`, `data`, `summary`. May be called again when more is known.
    """
    directory = Path(directory)
    about = read_json(directory / "export.json")
    if curves := curves_svg(metrics):
        (directory / "curves.svg").write_text(curves)
    (directory / "README.md").write_text(model_card(config, about, has_curves=bool(curves), **card))


def hf_config(config: DraftConfig, target: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The draft's config.json. Token ids and the tie flag are the target's, of `text_config` where the top has none."""
    sliding = "sliding_attention" in config.layer_types
    scalars = {name: value for name in SCALARS if (value := getattr(config, name)) is not None}
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": config.block_size,
        "bos_token_id": config_field(target, "bos_token_id"),
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            **scalars,  # here for SGLang, which does not look at the top
        },
        "dtype": dtype,
        "eos_token_id": config_field(target, "eos_token_id"),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range or 0.02,  # loaders want a number, and do not use it
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_target_layers": config.num_target_layers,
        "pad_token_id": config_field(target, "pad_token_id"),
        "rms_norm_eps": config.rms_norm_eps,
        # Old loaders read the first two, transformers 5 the third.
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": config.sliding_window if sliding else None,
        "tie_word_embeddings": bool(config_field(target, "tie_word_embeddings", False)),
        "use_cache": True,
        "use_sliding_window": sliding,
        "vocab_size": config.vocab_size,
        **scalars,
        **({} if config.is_causal is None else {"is_causal": config.is_causal}),
    }


def check_target(config: DraftConfig, target: Mapping[str, Any]) -> None:
    """Refuse a draft that the target cannot serve.

    Raises:
      ValueError: width, vocabulary, depth or rope differ; names the field and both values.
    """
    text = text_config(target)
    pairs = {
        "hidden_size": (config.hidden_size, text["hidden_size"]),
        "vocab_size": (config.vocab_size, text["vocab_size"]),
        "num_target_layers": (config.num_target_layers, text["num_hidden_layers"]),
        "rope_theta": (config.rope_theta, rope_theta(text)),
    }
    for name, (ours, theirs) in pairs.items():
        if theirs is not None and ours != theirs:
            raise ValueError(f"the draft's {name}={ours} is not the target's {theirs}; export it with its own target")


def check_tensors(tensors: Tensors, config: DraftConfig, dtype: str) -> dict[str, np.ndarray]:
    """The tensors in the exported dtype, each one checked.

    A constant tensor is one that nothing was ever loaded into. The exception is a norm's weight of ones: that is how it
    starts, and in bfloat16 a short training leaves it there.

    Raises:
      ValueError: names the first tensor that is missing, extra, misshapen, not finite or constant.
    """
    shapes = {name: row.exported for name, row in tensor_table(config).items()}
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"tensor {min(missing)} is missing ({len(missing)} in all); export a complete checkpoint")
    if extra := tensors.keys() - shapes.keys():
        raise ValueError(f"tensor {min(extra)} is not part of this draft ({len(extra)} in all); export its own config")
    written = {}
    for name, shape in shapes.items():
        tensor = np.asarray(tensors[name])
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}; export its own config")
        cast = np.ascontiguousarray(tensor.astype(DTYPES[dtype]))
        # Cast first: the largest float32 numbers are infinite in bfloat16.
        if not np.isfinite(cast.astype(np.float32)).all():
            raise ValueError(f"tensor {name} has values that are not finite in {dtype}; export an earlier checkpoint")
        first = tensor.flat[0]
        if (tensor == first).all() and not (len(shape) == 1 and first == 1):
            raise ValueError(
                f"tensor {name} is constant ({float(first):g}), so it was never set; export another checkpoint"
            )
        written[name] = cast
    return written


def _put_in_place(finished: Path, directory: Path) -> None:
    """Give the finished directory its name. A crash between the renames leaves the old one under a hidden name."""
    if not directory.exists():
        finished.rename(directory)
        return
    replaced = directory.parent / f".{directory.name}.replaced-{os.getpid()}"
    directory.rename(replaced)
    finished.rename(directory)
    shutil.rmtree(replaced)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def digest(tensor: np.ndarray) -> str:
    """Digest of a tensor's values as little-endian float32; equal to `feature_bridge.check.digest`."""
    return hashlib.blake2b(np.ascontiguousarray(tensor, "<f4").data, digest_size=16).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Export a run's draft for z-lab's class, SpecForge, SGLang and vLLM."""

    checkpoint: str
    """Directory of a run, for example runs/NAME."""
    output: str
    """Directory to write."""
    step: str = "best"
    """Which checkpoint: a step's number, best (on held-out data; the latest where none was rated), latest or first."""
    target: str | None = None
    """Directory or hub id of the target; None: where it was during training."""
    revision: str | None = None
    """Pinned hub revision of --target; None: the run's."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the written tensors."""
    format: Form = "dflash"
    """dflash: what z-lab, SpecForge, SGLang and vLLM load; speculators: vLLM's own form."""


def export_run(arguments: Arguments) -> Path:
    """Export one checkpoint of a run. Raises ValueError: no such run, checkpoint or target, or as `export_draft`."""
    step: int | str | None = int(arguments.step) if arguments.step.isdigit() else arguments.step
    run_dir = Path(arguments.checkpoint)
    if step == "best" and (run_dir / "checkpoints").is_dir():
        with Checkpoints(run_dir, keep=10**6, read_only=True) as checkpoints:
            step = "latest" if checkpoints.best is None else "best"
    params, meta = load_params(run_dir, step)
    config = msgspec.convert(meta["draft"], DraftConfig)
    trained = meta["config"]["target"]
    target, revision = arguments.target or trained["path"], arguments.revision or trained["revision"]
    return export_draft(
        to_tensors(params, config),
        config,
        read_target(target, revision),
        arguments.output,
        dtype=arguments.dtype,
        form=arguments.format,
        capture=meta["capture"],
        provenance={
            "run": meta["config"]["name"],
            "step": meta["step"],
            "target": target,
            "backend": meta.get("backend"),  # None: of a run that did not write it down
        },
        card={"recipe": meta["config"], **_known_of(run_dir, meta["step"])},
    )


def read_target(path: str, revision: str | None) -> dict[str, Any]:
    """The config.json of a target, a directory or a hub id. Raises ValueError: there is none."""
    try:
        return read_config(find_model(path, revision, weights=False), "target")
    except ValueError as error:
        message = str(error).replace("target.path=", "target ").replace("target.revision", "--revision")
        raise ValueError(f"{message}; --target says where it is") from error


def _known_of(run_dir: Path, step: int) -> dict[str, Any]:
    """What a run's directory tells the model card: curves, data, and the evaluation where that is of this step."""
    file = run_dir / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    return {
        "metrics": read_metrics(run_dir / "metrics.jsonl", step),
        "data": summary.get("data"),
        "summary": summary if summary.get("steps") == step else None,
    }


def main() -> None:
    print(f"exported to {export_run(parse_options(Arguments, None, 'python -m jaxdraft.export'))}")


if __name__ == "__main__":
    run_command(main)

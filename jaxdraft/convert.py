"""Reading drafts: an exported directory, or a published one, as the weights that a training starts from.

    python -m jaxdraft.convert --draft DIR --target DIR --output DIR [--format dflash|speculators]

z-lab's old and new config.json, speculators' form, and what `feature_bridge.specforge_checkpoint` makes of a training
checkpoint of SpecForge. `draft.init_from` reads them as they are; the command writes them as `jaxdraft.export` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from feature_bridge.model_files import open_tensors, read_config, read_json
from jaxdraft.cli import parse_options, run_command
from jaxdraft.export import Form, check_tensors, export_draft, read_target
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.speculators import OF_THE_TARGET, from_speculators, is_speculators

# Parts of other draft families that this model lacks; a config that switches one on is refused by its name.
FOREIGN_FIELDS = ("projector_type", "pure_draft_prefix_len", "shift_label", "selector_rank", "conv_kernel_size")


def load_draft(directory: str | Path) -> tuple[dict[str, np.ndarray], DraftConfig]:
    """Tensors by exported name, in their stored dtype, and the shape of a draft on disk.

    Raises:
      ValueError: no such draft, a config this model does not compute, or tensors that are not exactly the draft's.
    """
    directory = Path(directory)
    config = read_draft_config(directory)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with open_tensors(file, "flax") as stored:  # numpy's own reader knows no bfloat16
            names = stored.keys()
            tensors |= {name.removeprefix("model."): np.asarray(stored.get_tensor(name)) for name in names}
    if form_of(directory) == "speculators":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in OF_THE_TARGET}
    if not tensors:
        raise ValueError(f"draft {directory} has no .safetensors file; give an exported draft's directory")
    try:
        check_tensors(tensors, config, "float32")
    except ValueError as error:
        raise ValueError(f"draft {directory}: {error}") from error
    return tensors, config


def read_draft_config(directory: str | Path) -> DraftConfig:
    """The shape of a draft from its config.json: z-lab's old and new forms, and speculators'.

    Raises:
      ValueError: no config.json, or a field that this model does not compute.
    """
    file = Path(directory) / "config.json"
    config = _read_config(directory)
    try:
        return parse_draft_config(from_speculators(config) if is_speculators(config) else config)
    except KeyError as error:
        raise ValueError(f"{file} has no field {error}; give a DFlash draft's config") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a field of the wrong type ({error}); give a DFlash draft's config") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def form_of(directory: str | Path) -> str:
    """ "dflash" or "speculators". Raises ValueError: no config.json."""
    return "speculators" if is_speculators(_read_config(directory)) else "dflash"


def _read_config(directory: str | Path) -> dict[str, Any]:
    if (Path(directory) / "checkpoints").is_dir():
        raise ValueError(
            f"draft {directory} is the directory of a run; give its export/, or export one of its checkpoints"
        )
    return read_config(directory, "draft")


def parse_draft_config(config: Mapping[str, Any]) -> DraftConfig:
    """DraftConfig of a config.json's fields. Raises ValueError or KeyError as `read_draft_config` says."""
    nested = config.get("dflash_config") or {}

    def either(name: str, default: Any = None) -> Any:
        """Newer configs keep this in `dflash_config`, older ones at the top."""
        return nested.get(name, config.get(name, default))

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    num_layers = config["num_hidden_layers"]
    layer_types = tuple(config.get("layer_types") or ["full_attention"] * num_layers)
    sliding = "sliding_attention" in layer_types
    unsupported = {
        "architectures": (config.get("architectures", ["DFlashDraftModel"]), ["DFlashDraftModel"]),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias") or False, False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        # vLLM refuses the first, SGLang rotates less of a head with the second, z-lab's class reads neither.
        "mrope_section": (rope.get("mrope_section"), None),
        "partial_rotary_factor": (config.get("partial_rotary_factor") or 1.0, 1.0),
        # Qwen3's config class, and so every engine, has no window without it, whatever layer_types says.
        "use_sliding_window": (sliding and config.get("use_sliding_window", False), sliding),
        **{name: (either(name) or None, None) for name in FOREIGN_FIELDS},
    }
    for name, (found, computed) in unsupported.items():
        if found != computed:
            raise ValueError(f"{name}={found!r} is not supported, only {computed!r}; start from another draft")

    mask_token_id, layer_ids = either("mask_token_id"), either("target_layer_ids")
    for name, value in (("mask_token_id", mask_token_id), ("target_layer_ids", layer_ids)):
        if value is None:
            raise ValueError(f"{name} is missing; a DFlash draft's config names it in dflash_config")
    scalars = {name: either(name) for name in ("input_embedding_scale", "output_multiplier")}
    scalars["final_logit_softcapping"] = either("final_logit_softcapping") or None  # 0 means none, as to z-lab
    return DraftConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=num_layers,
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        block_size=int(either("block_size", 16)),
        target_layer_ids=tuple(layer_ids),
        num_target_layers=config["num_target_layers"],
        mask_token_id=int(mask_token_id),
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        layer_types=layer_types,
        sliding_window=config.get("sliding_window") if sliding else None,
        is_causal=either("is_causal"),
        **{name: None if value is None else float(value) for name, value in scalars.items()},
        max_position_embeddings=config.get("max_position_embeddings", 40960),
    )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Convert a draft on disk into another form, with the checks of an export."""

    draft: str
    """Directory of the draft: z-lab's, SpecForge's, SGLang's, speculators' or ours."""
    target: str
    """Directory or hub id of its target."""
    revision: str | None = None
    """Pinned hub revision of --target."""
    output: str
    """Directory to write."""
    format: Form = "dflash"
    """dflash: what z-lab, SpecForge, SGLang and vLLM load; speculators: vLLM's own form."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the written tensors."""


def convert(arguments: Arguments) -> Path:
    """Raises ValueError: no such draft or target, or one that does not fit the other."""
    tensors, config = load_draft(arguments.draft)
    output, draft = Path(arguments.output).resolve(), Path(arguments.draft).resolve()
    if output in (draft, *draft.parents):
        raise ValueError(f"--output {arguments.output} holds --draft and would replace it; give another directory")
    file = Path(arguments.draft) / "export.json"
    about = read_json(file) if file.is_file() else {}
    return export_draft(
        tensors,
        config,
        read_target(arguments.target, arguments.revision),
        arguments.output,
        dtype=arguments.dtype,
        form=arguments.format,
        capture=about.get("capture", "layer_output"),
        provenance={
            "target": arguments.target,
            "converted_from": arguments.draft,
            "backend": about.get("backend"),
        },
    )


def main() -> None:
    print(f"converted to {convert(parse_options(Arguments, None, 'python -m jaxdraft.convert'))}")


if __name__ == "__main__":
    run_command(main)

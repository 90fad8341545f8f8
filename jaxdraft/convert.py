"""Reading drafts: an exported directory, or a published one, as the weights that a training starts from.

    python -m jaxdraft.convert --draft DIR --target DIR --output DIR [--format dflash|speculators]

z-lab's old and new config.json, speculators' form, and what `feature_bridge.specforge_checkpoint` makes of a training
checkpoint of SpecForge. `draft.init_from` reads them as they are; the command writes them as `jaxdraft.export` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from feature_bridge.draft_files import read_shape
from feature_bridge.model_files import draft_tensors, read_config, read_json
from jaxdraft.cli import parse_options, run_command
from jaxdraft.export import Form, check_tensors, export_draft, read_target
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.speculators import OF_THE_TARGET, from_speculators, is_speculators


def load_draft(directory: str | Path) -> tuple[dict[str, np.ndarray], DraftConfig]:
    """Tensors by exported name, in their stored dtype, and the shape of a draft on disk.

    Raises:
      ValueError: no such draft, a config this model does not compute, or tensors that are not exactly the draft's.
    """
    directory = Path(directory)
    config = read_draft_config(directory)
    # numpy's own reader knows no bfloat16
    tensors = {name: np.asarray(tensor) for name, tensor in draft_tensors(directory, "flax").items()}
    if form_of(directory) == "speculators":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in OF_THE_TARGET}
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
    """DraftConfig of the fields of a config.json in z-lab's old or new form. Raises ValueError: see `read_shape`."""
    return DraftConfig(**dataclasses.asdict(read_shape(config)))


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

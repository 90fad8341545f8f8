"""Converts a training checkpoint of SpecForge to a draft's directory, from which `draft.init_from` can start.

    python -m feature_bridge.specforge_checkpoint --checkpoint DIR --draft-config FILE --output DIR

SpecForge keeps a draft's weights in a pickle of torch, `training_state.pt` (of it only `draft_state_dict` is read, by
torch's restricted unpickler), and its shape in the config file that the training was started with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from feature_bridge.draft_files import read_shape
from feature_bridge.model_files import first_line
from feature_bridge.torch_draft import weight_names

STATE_FILE = "training_state.pt"


def convert(checkpoint: Path, draft_config: Path, output: Path) -> Path:
    """Write `output`: model.safetensors, in the checkpoint's dtype, and config.json.

    Args:
      checkpoint: a folder with `training_state.pt`, that file, or a run's folder of `..-step<N>` folders: the latest.

    Raises:
      ValueError: no such checkpoint, one of another kind of draft, weights that are not the config's, or an output that
        is there already.
    """
    state_file = find_state(checkpoint)
    if output.exists():
        raise ValueError(f"--output {output} is there already; give another directory")
    try:
        config = json.loads(draft_config.read_text())
        shape = read_shape(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {draft_config}: {error}") from error
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the file, of torch's reader and of its unpickler
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"cannot read {state_file}, which may be cut off ({why}); copy it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{state_file} is not a SpecForge checkpoint; give a checkpoint of a SpecForge training")
    if state.get("strategy") not in (None, "dflash"):
        raise ValueError(f"{state_file} is of strategy {state['strategy']!r}; only a 'dflash' draft can be converted")
    # SpecForge strips its wrapper's prefix when it saves; older releases did not.
    weights = {name.removeprefix("draft_model."): w for name, w in state.get("draft_state_dict", {}).items()}
    weights = {name: w.contiguous() for name, w in weights.items() if "rotary_emb" not in name}
    if wrong := sorted(set(weights) ^ set(weight_names(shape.num_layers))):
        raise ValueError(
            f"{state_file} and {draft_config} differ in {len(wrong)} tensors, e.g. {wrong[0]}; give its own"
        )
    unfinished = output.with_name(f".{output.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    unfinished.rename(output)
    return output


def find_state(checkpoint: Path) -> Path:
    """The `training_state.pt` meant. Raises ValueError: there is none, or those of several runs."""
    if checkpoint.is_file():
        return checkpoint
    if (checkpoint / STATE_FILE).is_file():
        return checkpoint / STATE_FILE
    names = [(*file.parent.name.rpartition("-step")[::2], file) for file in checkpoint.glob(f"*-step*/{STATE_FILE}")]
    numbered = {int(step): file for _, step, file in names if step.isdigit()}
    if len(runs := sorted({run for run, step, _ in names if step.isdigit()})) > 1:
        raise ValueError(f"--checkpoint {checkpoint} holds several runs ({', '.join(runs)}); give a checkpoint")
    if not numbered:
        raise ValueError(f"--checkpoint {checkpoint} holds no {STATE_FILE}; give a checkpoint of a SpecForge training")
    return numbered[max(numbered)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m feature_bridge.specforge_checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="its directory, or that of the whole training")
    parser.add_argument("--draft-config", type=Path, required=True, help="config.json of the draft that was trained")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    args = parser.parse_args(argv)
    try:
        print(f"converted to {convert(args.checkpoint, args.draft_config, args.output)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

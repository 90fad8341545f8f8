"""The parity gate: is the draft that engines load the one that was trained?

    python -m jaxdraft.check --draft DIR --config NAME [--any.field value ...]

The same held-out conversations (text, one picture, several, a video) through the JAX draft and, in the bridge, through
every system that loads the directory: what each understood of config.json, the tensors it holds, its hidden states, the
logits of the target's head on them, the blocks it proposes and how much of them is accepted. An engine that misreads a
draft still answers right, only slower; here it is an error with a name. A run checks its first checkpoint by itself.

The comparison is `jaxdraft.parity`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table

from feature_bridge.model_files import read_json, unread_weights
from jaxdraft.bridges import Bridge, BridgeError
from jaxdraft.cli import Parser, parse_command, run_command
from jaxdraft.config import Config
from jaxdraft.convert import form_of, load_draft, read_draft_config
from jaxdraft.evaluate import as_served
from jaxdraft.export import check_target, digest, export_draft
from jaxdraft.features import FeatureStream
from jaxdraft.held_out import open_held_out, prepare_jax
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import from_tensors, to_tensors
from jaxdraft.model_card import not_served_by_sglang
from jaxdraft.objective import Frozen, Params
from jaxdraft.parity import (
    SYSTEMS,
    Conversation,
    Verdict,
    compare_systems,
    config_fields,
    conversations_of,
    field_difference,
    tensor_difference,
)
from jaxdraft.report import say
from jaxdraft.run import Request
from jaxdraft.target import TargetModel, open_target
from jaxdraft.tau_table import MODALITIES

# --- the directory ----------------------------------------------------------------------------------------------------


def trained_config(directory: str | Path) -> DraftConfig:
    """The draft as it was trained: what export.json says of it, else (another project's draft) its config.json.

    Raises ValueError: neither can be read.
    """
    file = Path(directory) / "export.json"
    about = read_json(file) if file.is_file() else {}
    if "draft" not in about:
        return read_draft_config(directory)
    return msgspec.convert(about["draft"], DraftConfig)


def check_directory(
    directory: str | Path, target_config: Mapping[str, Any]
) -> tuple[Verdict, Params | None, DraftConfig | None]:
    """The files by themselves: a verdict, the parameters and the trained config; None where they cannot be loaded."""
    draft, difference = None, ""
    try:
        draft = trained_config(directory)
        difference = served_difference(directory, draft)
        check_target(draft, target_config)
        tensors, _ = load_draft(directory)
    except ValueError as error:
        return Verdict(system="files", status="failed", difference=difference or str(error)), None, draft
    file = Path(directory) / "export.json"
    recorded = read_json(file).get("tensors", {}) if file.is_file() else {}
    stored = {name: digest(np.asarray(tensor)) for name, tensor in tensors.items()}
    difference = difference or (tensor_difference(stored, recorded) if recorded else "")
    params = {name: jnp.asarray(array, jnp.float32) for name, array in from_tensors(tensors, draft).items()}
    note = "config.json and tensors against export.json" if recorded else "no export.json: config.json is believed"
    return (
        Verdict(system="files", status="differs" if difference else "same", note=note, difference=difference),
        params,
        draft,
    )


def served_difference(directory: str | Path, draft: DraftConfig) -> str:
    """The first field of config.json that is not as the draft was trained; empty: none.

    Raises ValueError: no config.json, or one that this model does not compute.
    """
    served = read_draft_config(directory)
    if difference := field_difference(config_fields(served), draft):
        return difference
    for name in (field.name for field in dataclasses.fields(DraftConfig)):
        # How it was initialised does not matter any more.
        if name != "initializer_range" and getattr(served, name) != getattr(draft, name):
            return f"{name} is {getattr(served, name)}, and the draft was trained with {getattr(draft, name)}"
    return ""


# --- during training --------------------------------------------------------------------------------------------------


def check_first(
    state_params: Params,
    draft: DraftConfig,
    frozen: Callable[[], Frozen],
    conversations: Sequence[Conversation],
    bridge: Bridge,
    target: TargetModel,
    target_dtype: str,
) -> Verdict:
    """The draft in training against its own export in the bridge's torch draft.

    A wrong rope, mask token, layer id or tensor is seen here, in the run's first minutes and not when it is served.

    Raises:
      ValueError: they differ; names what.
    """
    params = as_served(state_params)

    def as_target() -> Frozen:
        narrow = jnp.bfloat16 if target_dtype == "bfloat16" else None
        return jax.tree.map(lambda matrix: matrix.astype(narrow or matrix.dtype), frozen())

    with tempfile.TemporaryDirectory(prefix="jaxdraft-first-") as scratch:
        directory = export_draft(to_tensors(params, draft), draft, target.config, Path(scratch) / "draft")
        _, verdict = compare_systems(bridge, directory, params, draft, as_target, conversations, ("torch",))
    if verdict.failed:
        raise ValueError(
            f"this checkpoint, exported, is not the draft in training: {verdict.difference}; "
            "this is a fault of the export and not of the run: keep its checkpoints"
        )
    return verdict


# --- the command ------------------------------------------------------------------------------------------------------


def choose_conversations(modality: UInt8[np.ndarray, " samples"]) -> dict[str, int]:
    """The first held-out conversation of each of the MODALITIES that there is."""
    kinds = {name: modality == i for i, name in enumerate(MODALITIES)}
    return {kind: int(np.flatnonzero(there)[0]) for kind, there in kinds.items() if there.any()}


def check_draft(directory: str | Path, config: Config, *, num_anchors: int = 6) -> list[Verdict]:
    """Every verdict on a draft's directory, with the target and the held-out data of a config.

    Raises:
      ValueError: no such target, or no held-out data.
      BridgeError: the bridge could not start, or failed.
    """
    target = open_target(config.target)
    files, params, draft = check_directory(directory, target.config)
    if params is None:
        return [files]
    with open_held_out(directory, draft, target, config, log_name="check.log") as held:
        chosen = choose_conversations(held.modality)
        conversations = []
        rows = config.rows_per_device
        requests = [
            Request("eval", tuple((r, (sample,) if r == 0 else ()) for r in range(rows))) for sample in chosen.values()
        ]
        stream = FeatureStream(held.bridge, requests)
        for kind, slot in zip(chosen, stream, strict=True):
            conversations += conversations_of(slot, [kind], num_anchors)
            stream.release(slot.filled)
        # As the target has them: a bfloat16 target rounds a float32 checkpoint.
        frozen = held.frozen(config.target.dtype)
        systems = SYSTEMS[form_of(directory)]
        verdicts = compare_systems(held.bridge, directory, params, draft, lambda: frozen, conversations, systems)
        return [files, *verdicts, *of_the_server(directory, systems, draft, target)]


def of_the_server(
    directory: str | Path, systems: Sequence[str], draft: DraftConfig, target: TargetModel
) -> list[Verdict]:
    """SGLang's draft class may compute all that is right, and its server still serve it wrongly, or not at all."""
    if "sglang" not in systems:
        return []
    notes = []
    model_type = target.config.get("model_type")
    if why := not_served_by_sglang(draft, model_type):
        notes.append(f"its server does not serve this draft with a {model_type} target ({why})")
    if others := unread_weights(Path(directory)):
        notes.append(f"its server loads {', '.join(others)} over model.safetensors; move what is not the draft away")
    return [Verdict(system="sglang's server", status="not run", note=note) for note in notes]


def print_verdicts(console: Console, title: str, verdicts: Sequence[Verdict]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("system")
    for name in ("verdict", "logit error", "same blocks", "near ties", "accept_len"):
        table.add_column(name, justify="right")
    for v in verdicts:
        table.add_row(
            v.system,
            v.status,
            "-" if v.error is None else f"{v.error:.1e}",
            f"{v.same_blocks}/{v.blocks}" if v.blocks else "-",
            str(v.near_ties) if v.blocks else "-",
            "-" if v.accept_len is None else f"{v.accept_len:.2f}",
        )
    console.print(table)
    for v in verdicts:
        if v.note:
            say(console, f"{v.system}: {v.note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a system differs from the JAX draft, or could not load what it should."""
    parser = Parser(prog="python -m jaxdraft.check", description=__doc__.splitlines()[0])
    parser.add_argument("--draft", metavar="DIR", required=True, help="directory of an exported draft")
    own, config = parse_command(parser, argv)
    prepare_jax(config)
    form_of(own.draft)  # that it is a draft at all
    verdicts = check_draft(own.draft, config)
    console = Console()
    print_verdicts(console, f"{own.draft} in every system", verdicts)
    failed = [v for v in verdicts if v.failed]
    for v in failed:
        say(console, f"{v.system} {v.status}: {v.difference}")
    return int(bool(failed))


if __name__ == "__main__":
    run_command(main, BridgeError)

"""What both trainers of a race are told, as a file that each process of it reads. Standard library only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINERS = ("jaxdraft", "specforge")
FILE = "race.json"
TAUS = "taus.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One race.

    Attributes:
      options: of `jaxdraft.train`, for every seed alike; all below follows from them.
      held_out: name and file of each set of held-out answers.
      steps: optimizer steps of a run. marks: those after which both trainers keep a draft.
      target, data: `feature_bridge.contracts.TargetSpec` and `DataSpec`.
      row_tokens, epochs: of the row plan (`jaxdraft.data.Schedule`).
      num_anchors: blocks of an optimizer step.
      dtype: of SpecForge's draft and features.
      attention, capture: SpecForge's, see `specforge_run` and `specforge_capture`.
    """

    options: tuple[str, ...]
    held_out: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    steps: int
    marks: tuple[int, ...]
    target: dict[str, Any]
    data: dict[str, Any]
    layer_ids: tuple[int, ...]
    row_tokens: int
    epochs: int
    num_anchors: int
    block_size: int
    mask_token_id: int
    loss_kind: str
    gamma: float | None
    dpace_alpha: float
    learning_rate: float
    warmup_ratio: float
    clip_norm: float
    weight_decay: float
    dtype: str
    attention: str
    capture: str

    def write(self, out: Path) -> None:
        (out / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def read_settings(out: Path) -> Settings:
    """The settings in a race's folder. Raises FileNotFoundError: there are none."""
    found = json.loads((out / FILE).read_text())
    found["held_out"] = tuple(tuple(pair) for pair in found["held_out"])
    for name in ("options", "seeds", "marks", "layer_ids"):
        found[name] = tuple(found[name])
    return Settings(**found)


def read_taus(out: Path) -> dict[str, Any]:
    """Taus of the drafts that were evaluated, by `TRAINER-SEED-STEP` and the name of the held-out set."""
    return json.loads((out / TAUS).read_text()) if (out / TAUS).is_file() else {}


def difference(old: Settings, new: Settings) -> str:
    """The first field in which two races differ, with both values; empty: none. More seeds are no difference."""
    for field in dataclasses.fields(Settings):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if field.name != "seeds" and json.dumps(before) != json.dumps(now):
            return f"{field.name}={now!r} where it had {before!r}"
    return ""


def marks_of(steps: int, points: int) -> tuple[int, ...]:
    """`points` steps at equal distances, the last step among them."""
    interval = -(-steps // points)
    return tuple(dict.fromkeys([*range(interval, steps, interval), steps]))


def start_dir(out: Path, seed: int) -> Path:
    """The initial draft of a seed, exported in float32."""
    return out / "start" / str(seed)


def draft_dir(out: Path, trainer: str, seed: int, step: int) -> Path:
    """An exported draft; step 0: the initial one."""
    return start_dir(out, seed) if step == 0 else out / "drafts" / f"{trainer}-{seed}" / str(step)


def times_file(out: Path, trainer: str, seed: int) -> Path:
    """Of a run that is complete: {"started", "ended": [seconds since 1970 of each step's end], "loss": [..], ..}."""
    return out / f"times-{trainer}-{seed}.json"

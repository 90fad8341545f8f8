"""What `benchmarks.recipe` compares: each variant is the base config with some of its fields given anew.

A variant differs from the base in one thing, so that its row of the table says what that thing does.
"""

from __future__ import annotations

import dataclasses

# 5 layers, block size 8: a draft of the shape that is published, for a small target.
BASE = (
    *("--draft.num-layers", "5", "--draft.block-size", "8", "--loss.gamma", "4"),
    *("--optim.learning-rate", "1e-3", "--data.row-tokens", "4096"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train.

    Attributes:
      fields: options of the config, as on the command line, after BASE.
      share: of the training rows that it sees; the same number of steps goes over them more often.
      source: which of the data files it trains on, by its place on the command line.
      steps: its training's length in multiples of the others'.
      final_norm: factor on the initial weights of the last norm.
    """

    fields: tuple[str, ...] = ()
    share: float = 1.0
    source: int = 0
    steps: float = 1.0
    final_norm: float = 1.0


def option(name: str, *values: object) -> Variant:
    return Variant(fields=(f"--{name}", *map(str, values)))


GROUPS: dict[str, dict[str, Variant]] = {
    "base": {"base": Variant()},
    "start": {
        "weights of width 0.02": option("draft.initializer-range", 0.02),
        "weights of width 0.04": option("draft.initializer-range", 0.04),
        "weights of width 0.08": option("draft.initializer-range", 0.08),
        "a last norm of 0.3": Variant(final_norm=0.3),
    },
    "rate": {f"learning rate {rate:g}": option("optim.learning-rate", rate) for rate in (3e-4, 6e-4, 2e-3, 4e-3)},
    "loss": {
        "gamma 2": option("loss.gamma", 2),
        "gamma 7": option("loss.gamma", 7),
        "no decay": option("loss.gamma", None),
        "D-PACE": option("loss.kind", "dpace"),
    },
    "anchors": {f"{number} anchors a row": option("anchors-per-row", number) for number in (170, 341, 1365)},
    "batch": {
        "2 rows a step, half the steps": Variant(fields=("--accumulation", "2"), steps=0.5),
        "2 rows a step": option("accumulation", 2),
    },
    "captured": {  # of a target of 30 layers
        "3 layers, spread": option("draft.target-layer-ids", 1, 14, 27),
        "5 layers, the later ones": option("draft.target-layer-ids", 14, 20, 24, 27, 28),
        "7 layers": option("draft.target-layer-ids", 1, 8, 14, 20, 24, 27, 28),
    },
    "depth": {f"{number} draft layers": option("draft.num-layers", number) for number in (2, 3, 8)},
    "data": {
        "a sixth of the answers": Variant(share=1 / 6),
        "half of the answers": Variant(share=0.5),
        "twice the steps": Variant(steps=2.0),
    },
    "block": {
        "B 16, gamma 7": Variant(fields=("--draft.block-size", "16", "--loss.gamma", "7")),
        "B 16, gamma 4": option("draft.block-size", 16),
    },
    "sampled": {"sampled answers": Variant(source=1)},
}

"""The tokenised samples of a race, as `tokens` leaves them and both sides read them: numpy alone.

Legend: T tokens of all samples that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt8

FILE = "tokens.npz"


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokens and loss masks of samples, one after the other."""

    tokens: Int32[np.ndarray, " T"]
    loss_mask: UInt8[np.ndarray, " T"]
    starts: Int64[np.ndarray, " samples_and_end"]

    def __getitem__(self, sample: int) -> tuple[Int32[np.ndarray, " t"], UInt8[np.ndarray, " t"]]:
        chosen = slice(self.starts[sample], self.starts[sample + 1])
        return self.tokens[chosen], self.loss_mask[chosen]


def read_samples(out: Path) -> tuple[Samples, dict[int, list[tuple[int, ...]]]]:
    """All samples of the index (those that no step uses are empty), and those of each step by seed."""
    with np.load(out / FILE) as file:
        found = Samples(file["tokens"], file["loss_mask"], file["starts"])
        seeds = [int(name.removeprefix("rows-")) for name in file.files if name.startswith("rows-")]
        rows = {seed: [tuple(map(int, row[row >= 0])) for row in file[f"rows-{seed}"]] for seed in seeds}
    return found, rows


def anchors_per_sample(valid: Sequence[int], wanted: int) -> int:
    """k for which the samples, with up to k anchors each of their `valid` ones, together have nearly `wanted`."""
    totals = [sum(min(k, count) for count in valid) for k in range(1, max(valid) + 1)]
    return 1 + int(np.abs(np.array(totals) - wanted).argmin())

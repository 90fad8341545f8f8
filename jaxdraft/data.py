"""Which samples make row r: a pure function of (lengths, seed, epoch, row_tokens).

Schedule length, packing, shuffling, resume and elastic resume all follow from it, so no iterator has state to save.
numpy's counter-based Philox generator keyed by (seed, epoch) gives the order: one line, the same on every host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

OPEN_ROWS = 64  # rows that packing keeps open at once: more pack tighter, fewer keep the shuffle more uniform


def plan_epoch(
    lengths: Int[np.ndarray, " samples"], *, seed: int, epoch: int, row_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Packs every sample into exactly one row, in shuffled order.

    Best fit among `OPEN_ROWS` open rows: a sample goes where it leaves the least space; when it fits nowhere the
    fullest row is closed.

    Args:
      lengths: tokens of each sample, each 1..row_tokens.
      seed, epoch: key of the order.
      row_tokens: S, a row's capacity.

    Returns:
      Rows, each the positions of its samples in `lengths`, in the order they stand in the row.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= row_tokens)
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(lengths))
    space = np.full(OPEN_ROWS, row_tokens)
    open_rows: list[list[int]] = [[] for _ in range(OPEN_ROWS)]
    closed: list[tuple[int, ...]] = []
    for sample in order:
        left = space - lengths[sample]
        left[left < 0] = row_tokens + 1
        place = int(left.argmin())
        if left[place] > row_tokens:
            place = int(space.argmin())
            closed.append(tuple(open_rows[place]))
            open_rows[place], space[place] = [], row_tokens
        open_rows[place].append(int(sample))
        space[place] -= lengths[sample]
    closed += [tuple(row) for row in open_rows if row]
    return tuple(closed)


@dataclass(frozen=True)
class Schedule:
    """All rows of a run, numbered from 0 across its epochs."""

    lengths: Int[np.ndarray, " samples"]
    seed: int
    epochs: int
    row_tokens: int

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        plans = (
            plan_epoch(self.lengths, seed=self.seed, epoch=epoch, row_tokens=self.row_tokens)
            for epoch in range(self.epochs)
        )
        return tuple(row for plan in plans for row in plan)

    def num_steps(self, rows_per_step: int) -> int:
        return -(-len(self.rows) // rows_per_step)

    def row(self, row_id: int) -> tuple[int, ...]:
        """Samples of row `row_id`; none past the end, where padding completes the last step."""
        return self.rows[row_id] if row_id < len(self.rows) else ()

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are in use."""
        return self.epochs * int(self.lengths.sum()) / max(1, len(self.rows) * self.row_tokens)


def plan_eval(lengths: Int[np.ndarray, " samples"], *, row_tokens: int, max_rows: int) -> tuple[tuple[int, ...], ...]:
    """The held-out rows of a run: always the same ones, whatever the seed."""
    return plan_epoch(lengths, seed=0, epoch=0, row_tokens=row_tokens)[:max_rows]

"""Two rounds of greedy answers side by side: where they part, whether the target nearly tied there. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# Of log-probability between the two tokens. bfloat16 keeps logits of 16 to 32 to 0.125, and a pass over one token
# rounds otherwise than one over a block: each of two logits may be two such units off.
NEAR_TIE = 0.5


def difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two answers have another token; None: nowhere, as far as both go.

    One that goes on where the other ends parts from it there: the other's last token is the end of the turn.
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def tie_of(best: Sequence[tuple[float, int]], one: int, other: int) -> float | None:
    """How far the less likely one of two tokens is behind the best; None where it is not among the best ones."""
    found = {token: logprob for logprob, token in best}
    if one not in found or other not in found:
        return None
    return max(found.values()) - min(found[one], found[other])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """The answers with a draft, compared with the target's alone.

    Attributes:
      equal: token for token.
      near_ties: part where the target's two best nearly tie.
      different: rows that part elsewhere, or where nobody knows.
      largest_gap: of the near ties.
    """

    equal: int
    near_ties: int
    different: tuple[int, ...]
    largest_gap: float

    def __str__(self) -> str:
        total = self.equal + self.near_ties + len(self.different)
        ties = f", {self.near_ties} up to a near tie (at most {self.largest_gap:.3f})" if self.near_ties else ""
        others = f", others: rows {list(self.different)[:8]}" if self.different else ""
        return f"{self.equal} of {total} token for token the target's own{ties}{others}"


def compare_texts(
    rows: Sequence[int],
    alone: Sequence[Mapping[str, Any]],
    draft: Sequence[Mapping[str, Any]],
    ties: Mapping[str, Mapping[str, Any]],
) -> Texts:
    """Args: answers by row; `ties`: by row as a string, {"token", "gap"} of those that part somewhere."""
    equal, gaps, different = 0, [], []
    for row, a, b in zip(rows, alone, draft, strict=True):
        if a["tokens"] == b["tokens"]:
            equal += 1
            continue
        gap = ties.get(str(row), {}).get("gap")
        if gap is not None and gap <= NEAR_TIE:
            gaps.append(gap)
        else:
            different.append(row)
    return Texts(equal=equal, near_ties=len(gaps), different=tuple(different), largest_gap=max(gaps, default=0.0))


def speed(one: Mapping[str, Any]) -> float:
    """Tokens a second of a round."""
    return one["tokens"] / one["seconds"]

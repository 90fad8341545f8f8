"""Checks of a row's features: they must be finite, and not all zero for a token in a layer.

Legend: S tokens of a row, K captured layers, H hidden size. The peak of a token in a layer is its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bridge.targets.base import Target


def start_check(features: Float[Tensor, "S K H"], spans: Sequence[slice]) -> list[Tensor]:
    """Smallest and largest peak of a token in a layer, for each run of spans (usually one), in host memory.

    Does not wait: read them (`passed`) when what was launched until now is done.
    """
    if not spans:
        return []
    peak_sk = _peaks(features)
    runs = [torch.stack(torch.aminmax(peak_sk[run])) for run, _ in joined(spans)]
    return [peaks.to("cpu", non_blocking=True) for peaks in runs]


def passed(check: Sequence[Tensor]) -> bool:
    """Whether all features are finite, and no token's are all zero in a layer."""
    return all(low > 0 and high < torch.inf for low, high in (peaks.tolist() for peaks in check))  # NaN is neither


def find_faults(target: Target, features: Float[Tensor, "S K H"], spans: Sequence[slice]) -> list[str | None]:
    """What is wrong with the features of each span: not finite, or all zero for a token of a layer."""
    faults: list[str | None] = []
    peak_sk = _peaks(features).cpu()
    for span in spans:
        peak = peak_sk[span]
        wrong, what = (~peak.isfinite(), "NaN or infinite") if not peak.isfinite().all() else (peak == 0, "all zero")
        at = [l for l, column in zip(target.layer_ids, wrong.unbind(1), strict=True) if column.any()]
        faults.append(f"{what} features of layers {at} from {target.info.backend}" if at else None)
    return faults


def _peaks(features: Float[Tensor, "S K H"]) -> Float[Tensor, "S K"]:
    return torch.linalg.vector_norm(features, torch.inf, dim=-1)


def joined(spans: Sequence[slice]) -> list[tuple[slice, slice]]:
    """Runs of neighbouring spans: (where in the row, where in the states of an extend over these spans alone)."""
    runs: list[tuple[slice, slice]] = []
    taken = 0
    for span in spans:
        start, first = span.start, taken
        if runs and runs[-1][0].stop == span.start:
            start, first = runs[-1][0].start, runs[-1][1].start
            runs.pop()
        taken += span.stop - span.start
        runs.append((slice(start, span.stop), slice(first, taken)))
    return runs

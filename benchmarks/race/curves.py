"""Curves of tau over time and what they say: pure functions of the times and taus of a race.

A clock is "process", seconds since the start of the trainer's process, or "first step", since the end of its first
step. A curve begins with the initial draft's tau at the end of the first step: before that there is nothing to serve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Points = Sequence[tuple[float, float]]  # seconds, tau; seconds ascend

CLOCKS = ("process", "first step")
SINCE = {"process": "the start of the process", "first step": "the end of the first step"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
      started: when its process was, seconds since 1970. ended: when each step was.
      taus: replayed tau after steps, step 0 included; bounds: of its interval over the held-out answers.
    """

    trainer: str
    seed: int
    started: float
    ended: Sequence[float]
    taus: Mapping[int, float]
    bounds: Mapping[int, tuple[float, float]]

    def seconds(self, step: int, clock: str) -> float:
        """Until the end of a step; step 0 counts as the first."""
        return self.ended[max(step, 1) - 1] - (self.started if clock == "process" else self.ended[0])

    def curve(self, clock: str) -> Points:
        return [(self.seconds(step, clock), tau) for step, tau in sorted(self.taus.items())]


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean of seeds that were evaluated at the same steps, times and taus alike."""
    return [tuple(map(float, np.mean(points, axis=0))) for points in zip(*curves, strict=True)]


def tau_at(points: Points, seconds: float) -> float:
    """Tau at a time, on the straight line between two points; before and after all of them the nearest one's."""
    return float(np.interp(seconds, *zip(*points, strict=True)))


def seconds_to(points: Points, tau: float) -> float | None:
    """When a curve first reaches a tau, on the straight line between two points; None: never."""
    if points[0][1] >= tau:
        return points[0][0]
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= tau:
            return before + (after - before) * (tau - low) / (high - low)
    return None


def shared_taus(curves: Sequence[Points], number: int) -> list[float]:
    """Taus, at equal distances, that all curves reach after their first point; the last is the highest of those."""
    low, high = max(points[0][1] for points in curves), min(max(tau for _, tau in points) for points in curves)
    return [low + (high - low) * (i + 1) / number for i in range(number)] if high > low else []


# --- how far two trainers may be apart --------------------------------------------------------------------------------


def mean_and_interval(taus: Sequence[float], bounds: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Mean over the seeds and its 95 % interval (Student's t); of a single seed, that over the held-out answers."""
    mean = float(np.mean(taus))
    if len(taus) == 1:
        return mean, *bounds[0]
    half = stats.t.ppf(0.975, len(taus) - 1) * float(np.std(taus, ddof=1)) / math.sqrt(len(taus))
    return mean, mean - half, mean + half


def margin(runs: Sequence[Run]) -> float:
    """How far the means of two trainers may differ at a step by their seeds alone: half a 95 % interval.

    The seeds' variance is pooled over both trainers and all evaluated steps but the initial one; the degrees of
    freedom are those of a single step, since one run's taus at different steps are not independent. With one seed each
    it is that of the held-out answers at the last step.
    """
    trainers = {run.trainer: [other for other in runs if other.trainer == run.trainer] for run in runs}
    steps = sorted(set(runs[0].taus) - {0})
    number = min(map(len, trainers.values()))
    if number == 1:
        halves = [(high - low) / 2 for low, high in (run.bounds[steps[-1]] for run in runs)]
        return math.hypot(*halves)
    variances = [np.var([run.taus[s] for run in own], ddof=1) for own in trainers.values() for s in steps]
    freedom = sum(len(own) - 1 for own in trainers.values())
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(np.mean(variances) * 2 / number))


def faults(runs: Sequence[Run]) -> list[str]:
    """What speaks against "the same tau at equal steps, and ahead at every point of time": a sentence each."""
    ours, theirs = ([run for run in runs if run.trainer == name] for name in ("jaxdraft", "specforge"))
    allowed, found = margin(runs), []
    for step in sorted(set(ours[0].taus) - {0}):
        mean, other = (float(np.mean([run.taus[step] for run in own])) for own in (ours, theirs))
        if abs(mean - other) > allowed:
            found.append(f"at step {step} tau is {mean:.3f} and SpecForge's {other:.3f}: more than {allowed:.3f} apart")
    for clock in CLOCKS:
        curve, other_curve = (mean_curve([run.curve(clock) for run in own]) for own in (ours, theirs))
        for seconds, tau in other_curve[1:]:
            if (own := tau_at(curve, seconds)) < tau - allowed:
                found.append(f"{seconds:.1f} s after {SINCE[clock]} tau is {own:.3f} and SpecForge's {tau:.3f}: behind")
    return found

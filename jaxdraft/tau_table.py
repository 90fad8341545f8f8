"""Where a draft is accepted: tau by modality, position in the answer and length of the answer, and how sure that is.

Two taus, bonus token included: of the replay (`jaxdraft.replay`), exact for greedy decoding where the recorded answers
are the target's own, and teacher-forced, where every token of an answer is an anchor. An interval is a bootstrap over
conversations, for the verify calls of one conversation are not independent of each other.

Legend: N calls, C conversations, R resamples, B block slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxdraft.eval_result import Answer, EvalResult
from jaxdraft.replay import anchors_of

MODALITIES = ("text", "one picture", "several pictures", "video")  # of what a sample shows; a video wins
POSITIONS = (0, 32, 128, 512)  # of the anchor in its answer, tokens: [0, 32), [32, 128), ..
LENGTHS = (0, 64, 256, 1024)  # of the answer, tokens


@dataclass(frozen=True, eq=False)
class Calls:
    """Verify calls, of a replay or with every token as anchor."""

    sample: Int[np.ndarray, " N"]
    position: Int[np.ndarray, " N"]  # of the anchor in the answer
    length: Int[np.ndarray, " N"]  # of the answer
    generated: Int[np.ndarray, " N"]  # tokens: the accepted ones, and the bonus token where the answer goes on

    def __getitem__(self, chosen: Bool[np.ndarray, " N"]) -> Calls:
        return Calls(self.sample[chosen], self.position[chosen], self.length[chosen], self.generated[chosen])

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def tau(self) -> float:
        return float(self.generated.mean()) if len(self) else math.nan


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One line of the table.

    Attributes:
      kind, name: "modality" "one picture", "position" "32-127", "length" "64-255", "all" "".
      conversations, calls: of the replay.
      tau: generated tokens a verify call of the replay; low, high: of its 95 % interval.
      tau_teacher_forced: of the blocks that are wholly in the answer, with its own interval; None without one.
      slot_acceptance: share of those blocks in which slot 1, .., B-1 is accepted.
    """

    kind: str
    name: str
    conversations: int
    calls: int
    tau: float
    low: float
    high: float
    tau_teacher_forced: float | None
    low_teacher_forced: float | None
    high_teacher_forced: float | None
    slot_acceptance: tuple[float, ...]


def replayed_calls(answers: Sequence[Answer], block_size: int) -> Calls:
    """Every verify call of greedy decoding of these answers."""
    anchors = [np.array(anchors_of(answer.replay(block_size), 0), int) for answer in answers]
    generated = [np.diff(a, append=len(answer.tokens) - 1) for a, answer in zip(anchors, answers, strict=True)]
    return _calls(answers, anchors, generated)


def forced_calls(answers: Sequence[Answer], block_size: int) -> Calls:
    """Every anchor of these answers whose block is wholly in its answer."""
    generated = [answer.teacher_forced(block_size) + 1 for answer in answers]
    return _calls(answers, [np.arange(len(g)) for g in generated], generated)


def _calls(answers: Sequence[Answer], anchors: Sequence[np.ndarray], generated: Sequence[np.ndarray]) -> Calls:
    counts = [len(a) for a in anchors]
    whole = [np.array(column, int) for column in ([a.sample for a in answers], [len(a.tokens) for a in answers])]
    sample, length = (np.repeat(column, counts) for column in whole)
    position, tokens = (np.concatenate([*parts, np.empty(0, int)]) for parts in (anchors, generated))
    return Calls(sample, position, length, tokens)


def modalities(index: Any) -> UInt8[np.ndarray, " samples"]:
    """Which of MODALITIES each sample of a split's index (`feature_bridge.contracts.IndexTable`) is."""
    num_images, num_videos = (np.frombuffer(column, np.uint8) for column in (index.num_images, index.num_videos))
    return np.where(num_videos > 0, MODALITIES.index("video"), np.minimum(num_images, 2)).astype(np.uint8)


def tau_table(
    result: EvalResult, modality: UInt8[np.ndarray, " samples"], *, resamples: int = 2000, seed: int = 0
) -> list[Bucket]:
    """The whole, then the buckets that are not empty.

    Args:
      modality: of each sample of the split's index: see `modalities`.
      resamples: R.
      seed: of the resampling; equal inputs give equal intervals.
    """
    replayed = replayed_calls(result.answers, result.block_size)
    forced = forced_calls(result.answers, result.block_size)
    kinds: dict[str, tuple[Sequence[str], Callable[[Calls], np.ndarray]]] = {
        "all": ([""], lambda calls: np.zeros(len(calls), int)),
        "modality": (MODALITIES, lambda calls: modality[calls.sample]),
        "position": (span_names(POSITIONS), lambda calls: np.searchsorted(POSITIONS, calls.position, "right") - 1),
        "length": (span_names(LENGTHS), lambda calls: np.searchsorted(LENGTHS, calls.length, "right") - 1),
    }
    table = []
    for kind, (names, numbers_of) in kinds.items():
        numbers = numbers_of(replayed), numbers_of(forced)
        for number, name in enumerate(names):
            there, blocks = replayed[numbers[0] == number], forced[numbers[1] == number]
            if len(there):
                low, high = interval(there, resamples=resamples, seed=seed)
                bounds = interval(blocks, resamples=resamples, seed=seed) if len(blocks) else (None, None)
                table.append(
                    Bucket(
                        kind=kind,
                        name=name,
                        conversations=len(np.unique(there.sample)),
                        calls=len(there),
                        tau=there.tau,
                        low=low,
                        high=high,
                        tau_teacher_forced=blocks.tau if len(blocks) else None,
                        low_teacher_forced=bounds[0],
                        high_teacher_forced=bounds[1],
                        slot_acceptance=tuple(
                            float((blocks.generated > k).mean()) for k in range(1, result.block_size) if len(blocks)
                        ),
                    )
                )
    return table


def span_names(edges: Sequence[int]) -> list[str]:
    """ "0-31", "32-127", .., "512+": the spans that begin at these edges."""
    return [*(f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)), f"{edges[-1]}+"]


def interval(calls: Calls, *, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of the calls' tau."""
    _, conversation = np.unique(calls.sample, return_inverse=True)
    generated = np.bincount(conversation, calls.generated)
    return bootstrap_ratio(generated, np.bincount(conversation).astype(float), resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerators: Float[np.ndarray, " C"], denominators: Float[np.ndarray, " C"], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of sum(numerators) / sum(denominators), conversations drawn with replacement."""
    count = len(numerators)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    ratios = (weights @ numerators) / (weights @ denominators)  # [R]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def expected_speedup(tau: float, *, target_step: float, draft_step: float, verify_step: float) -> float:
    """How many times faster than the target alone: tau tokens in the time of one draft and one verify step.

    Args:
      tau: tokens a verify call, bonus token included.
      target_step: seconds (or any unit) of one decoding step of the target alone, one token.
      draft_step: of the draft's one pass over a block.
      verify_step: of the target's pass over a block.

    Raises:
      ValueError: a time that is not positive.
    """
    for name, value in (("target", target_step), ("draft", draft_step), ("verify", verify_step)):
        if not value > 0:
            raise ValueError(f"--{name}-step={value} must be positive; give the time of one step, e.g. in milliseconds")
    return tau * target_step / (draft_step + verify_step)

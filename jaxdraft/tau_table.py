"""Where a draft is accepted: tau by modality, position in the answer and length of the answer, and how sure that is.

tau is of the replay (`jaxdraft.replay`), bonus token included: exact for greedy decoding where the recorded answers are
the target's own. An interval is a bootstrap over conversations, for the verify calls of one conversation are not
independent of each other.

Legend: C conversations, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxdraft.eval_result import Answer, EvalResult
from jaxdraft.replay import anchors_of

MODALITIES = ("text", "one picture", "several pictures", "video")  # of what a sample shows; a video wins
POSITIONS = (0, 32, 128, 512)  # of the anchor in its answer, tokens: [0, 32), [32, 128), ..
LENGTHS = (0, 64, 256, 1024)  # of the answer, tokens


@dataclass(frozen=True)
class Call:
    """One verify call of a replayed answer."""

    sample: int
    position: int  # of the anchor in the answer
    length: int  # of the answer
    generated: int  # tokens: the accepted ones, and the bonus token where the answer goes on


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One line of the table.

    Attributes:
      kind, name: "modality" "one picture", "position" "32-127", "length" "64-255", "all" "".
      conversations, calls: that it has.
      tau: generated tokens a verify call.
      low, high: of the 95 % interval.
    """

    kind: str
    name: str
    conversations: int
    calls: int
    tau: float
    low: float
    high: float


def replayed_calls(answers: Iterable[Answer], block_size: int) -> list[Call]:
    """Every verify call of greedy decoding of these answers."""
    calls = []
    for answer in answers:
        lens = answer.replay(block_size)
        anchors = anchors_of(lens, 0)
        ends = (*anchors[1:], len(answer.tokens) - 1) if anchors else ()
        calls += [Call(answer.sample, a, len(answer.tokens), end - a) for a, end in zip(anchors, ends, strict=True)]
    return calls


def modalities(index: Any) -> UInt8[np.ndarray, " samples"]:
    """Of each sample of a split's index (`feature_bridge.contracts.IndexTable`), which of MODALITIES it is."""
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
    calls = replayed_calls(result.answers, result.block_size)
    by: dict[str, Callable[[Call], str]] = {
        "all": lambda call: "",
        "modality": lambda call: MODALITIES[modality[call.sample]],
        "position": lambda call: span_name(call.position, POSITIONS),
        "length": lambda call: span_name(call.length, LENGTHS),
    }
    orders = {
        "all": [""],
        "modality": list(MODALITIES),
        "position": [span_name(edge, POSITIONS) for edge in POSITIONS],
        "length": [span_name(edge, LENGTHS) for edge in LENGTHS],
    }
    table = []
    for kind, name_of in by.items():
        for name in orders[kind]:
            there = [call for call in calls if name_of(call) == name]
            if there:
                table.append(_bucket(kind, name, there, resamples, seed))
    return table


def span_name(value: int, edges: Sequence[int]) -> str:
    """ "32-127" for a value in [32, 128)."""
    i = int(np.searchsorted(edges, value, side="right")) - 1
    return f"{edges[i]}-{edges[i + 1] - 1}" if i + 1 < len(edges) else f"{edges[i]}+"


def _bucket(kind: str, name: str, calls: Sequence[Call], resamples: int, seed: int) -> Bucket:
    _, conversation = np.unique([call.sample for call in calls], return_inverse=True)
    generated = np.bincount(conversation, [call.generated for call in calls])
    number = np.bincount(conversation).astype(float)
    low, high = bootstrap_ratio(generated, number, resamples=resamples, seed=seed)
    return Bucket(
        kind=kind,
        name=name,
        conversations=len(number),
        calls=len(calls),
        tau=float(generated.sum() / number.sum()),
        low=low,
        high=high,
    )


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
            raise ValueError(f"--{name}-step={value} is no time; give what one step takes, in milliseconds say")
    return tau * target_step / (draft_step + verify_step)

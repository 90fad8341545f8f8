"""What an evaluation found: accepted lengths on held-out conversations, teacher-forced, replayed and really decoded.

tau counts tokens a verify call, the target's own bonus token included; accept_len is the draft's part, without it.

Legend: T tokens of an answer, B block slots.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdraft.replay import mean_tau, replay, tau


@dataclass(frozen=True, eq=False)
class Answer:
    """One assistant turn of a held-out conversation.

    Attributes:
      sample: position of the conversation in the split's index.
      last: no assistant turn follows; only such a turn is really decoded.
      tokens: the answer through its end-of-turn token.
      accept_len_at: draft tokens accepted with the anchor at each of its tokens.
    """

    sample: int
    last: bool
    tokens: Int[np.ndarray, " T"]
    accept_len_at: Int[np.ndarray, " T"]

    def teacher_forced(self, block_size: int, max_new_tokens: int = sys.maxsize) -> Int[np.ndarray, " blocks"]:
        """Accepted draft tokens with each token as anchor that a whole block of the answer begins with."""
        return self.accept_len_at[: max(0, min(len(self.tokens), max_new_tokens) - block_size + 1)]

    def replay(self, block_size: int, max_new_tokens: int = sys.maxsize) -> tuple[int, ...]:
        """Accepted draft tokens of each verify call while decoding this answer."""
        return replay(self.accept_len_at, 0, min(len(self.tokens), max_new_tokens), block_size)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What held-out rows gave.

    Attributes:
      block_size: B.
      loss, accuracy: over the supervised slots of all blocks.
      slot_accuracy: of slots 1..B-1.
      accept_counts: teacher-forced blocks by accepted draft tokens, 0..B-1.
      answers: every assistant turn.
    """

    block_size: int
    loss: float
    accuracy: float
    slot_accuracy: tuple[float, ...]
    accept_counts: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def accept_len(self) -> float:
        """Draft tokens accepted a block, without the bonus token; NaN without a wholly supervised block."""
        blocks = sum(self.accept_counts)
        return sum(n * count for n, count in enumerate(self.accept_counts)) / blocks if blocks else math.nan

    @property
    def tau(self) -> float:
        """Teacher-forced tau, bonus token included."""
        return self.accept_len + 1.0

    @property
    def slot_acceptance(self) -> tuple[float, ...]:
        """Share of blocks in which slot 1, .., B-1 is accepted."""
        blocks = sum(self.accept_counts)
        return tuple(
            sum(self.accept_counts[k:]) / blocks if blocks else math.nan for k in range(1, len(self.accept_counts))
        )

    @property
    def tau_replay(self) -> float:
        """Tau of the replay, pooled over all answers."""
        return tau(
            (len(answer.tokens) for answer in self.answers),
            (len(answer.replay(self.block_size)) for answer in self.answers),
        )

    def metrics(self) -> dict[str, Any]:
        """The figures for the log, as JSON; None where there was nothing to divide by."""
        names = ("loss", "accuracy", "slot_accuracy", "slot_acceptance", "accept_len", "tau", "tau_replay")
        return {name: finite(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class DecodeResult:
    """What really decoding some conversations gave. `samples` are `feature_bridge.contracts.DecodedSample`s."""

    samples: tuple[Any, ...]
    max_new_tokens: int

    @property
    def tau(self) -> float:
        """Tokens after each answer's first over verify calls, pooled; NaN without a verify call."""
        return tau((len(s.tokens) for s in self.samples), (len(s.accept_lens) for s in self.samples))

    @property
    def mean_tau(self) -> float:
        """The mean of the conversations' own taus, as z-lab reports it."""
        return mean_tau((len(s.tokens) for s in self.samples), (len(s.accept_lens) for s in self.samples))

    @property
    def lossless(self) -> bool:
        """Every text is the target's own greedy output: token for token, or as far as rounding decides the next one."""
        return all(s.tokens == s.target_tokens or s.near_tie for s in self.samples)

    @property
    def near_ties(self) -> int:
        """Texts that part from the target's own where its logits of both tokens are equal up to rounding."""
        return sum(s.near_tie for s in self.samples)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Replay against decoding, on the decoded conversations whose recorded answer is the target's own greedy one.

    Attributes:
      compared: such conversations.
      identical: those of them in which every verify call accepted as many tokens as in the replay.
      tau_teacher_forced, tau_replay, tau_decoded: of the compared answers alone, so that one can be divided by another.
    """

    compared: int
    identical: int
    tau_teacher_forced: float
    tau_replay: float
    tau_decoded: float

    @property
    def calibration(self) -> dict[str, float]:
        """What the two cheap measures have to be multiplied by to give the real one."""
        return {
            "decoded_over_teacher_forced": self.tau_decoded / self.tau_teacher_forced,
            "decoded_over_replay": self.tau_decoded / self.tau_replay,
        }

    @property
    def agrees(self) -> bool:
        """The taus differ by at most 3 %: draft predictions that nearly tie may fall either way in two programs."""
        return bool(self.compared) and abs(self.tau_replay - self.tau_decoded) <= 0.03 * self.tau_decoded


def agreement(result: EvalResult, decoded: DecodeResult) -> Agreement:
    """Compare decoding with the replay of the same conversations."""
    answers = {answer.sample: answer for answer in result.answers if answer.last}
    lengths, forced, replayed, real = [], [], [], []
    for sample in decoded.samples:
        answer = answers.get(sample.sample)
        if answer is None or tuple(answer.tokens[: decoded.max_new_tokens]) != sample.tokens:
            continue
        lengths.append(len(sample.tokens))
        forced.append(answer.teacher_forced(result.block_size, decoded.max_new_tokens))
        replayed.append(answer.replay(result.block_size, decoded.max_new_tokens))
        real.append(sample.accept_lens)
    return Agreement(
        compared=len(lengths),
        identical=sum(a == b for a, b in zip(replayed, real, strict=True)),
        tau_teacher_forced=float(np.concatenate(forced).mean()) + 1 if sum(map(len, forced)) else math.nan,
        tau_replay=tau(lengths, map(len, replayed)),
        tau_decoded=tau(lengths, map(len, real)),
    )


def summarise(result: EvalResult, decoded: DecodeResult | None) -> dict[str, Any]:
    """The figures of an evaluation under the names of summary.json, as JSON."""
    summary: dict[str, Any] = {
        "tau_teacher_forced": result.tau,
        "tau_replay": result.tau_replay,
        "tau_decoded": None,
        "accept_len": result.accept_len,
        "slot_acceptance": result.slot_acceptance,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_decoded": 0,
        "lossless": None,
    }
    if decoded is not None and decoded.samples:
        same = agreement(result, decoded)
        summary |= {
            "tau_decoded": decoded.tau,
            "tau_decoded_mean": decoded.mean_tau,
            "num_decoded": len(decoded.samples),
            # Of each conversation: tokens after its first, and verify calls.
            "decoded": [(max(0, len(s.tokens) - 1), len(s.accept_lens)) for s in decoded.samples],
            "lossless": decoded.lossless,
            "near_ties": decoded.near_ties,
            "replay_compared": same.compared,
            "replay_identical": same.identical,
            "replay_agrees": same.agrees if same.compared else None,
            "calibration": {name: finite(value) for name, value in same.calibration.items()},
        }
    return {name: finite(value) for name, value in summary.items()}


def finite(value: Any) -> Any:
    """Numbers and lists of them as JSON has them: None in place of NaN and infinity."""
    if isinstance(value, (tuple, list)):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

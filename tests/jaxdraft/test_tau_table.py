"""Tau by bucket: every verify call is counted once, in the right one; intervals that mean what they say."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxdraft.eval_result import Answer, EvalResult
from jaxdraft.tau_table import (
    MODALITIES,
    POSITIONS,
    bootstrap_ratio,
    expected_speedup,
    forced_calls,
    modalities,
    replayed_calls,
    span_names,
    tau_table,
)

BLOCK_SIZE = 6


@pytest.fixture(scope="module")
def result():
    rng = np.random.default_rng(7)
    answers = []
    for sample in range(40):
        for turn in range(1 + sample % 2):
            length = int(rng.choice([1, 2, 30, 90, 600]))
            lens = np.minimum(rng.integers(0, BLOCK_SIZE, length), np.arange(length)[::-1])
            answers.append(Answer(sample, turn == sample % 2, rng.integers(0, 9, length), lens))
    return EvalResult(
        block_size=BLOCK_SIZE, loss=1.0, accuracy=0.5, slot_accuracy=(), accept_counts=(), answers=tuple(answers)
    )


@pytest.fixture(scope="module")
def modality():
    index = SimpleNamespace(num_images=bytes(s % 4 for s in range(40)), num_videos=bytes(s % 8 == 7 for s in range(40)))
    return modalities(index)


def test_modality_of_a_sample():
    index = SimpleNamespace(num_images=bytes([0, 1, 2, 255, 0, 3]), num_videos=bytes([0, 0, 0, 0, 1, 255]))
    names = ["text", "one picture", "several pictures", "several pictures", "video", "video"]
    assert [MODALITIES[i] for i in modalities(index)] == names


def test_every_call_is_in_one_bucket_of_a_kind(result, modality):
    table = tau_table(result, modality)
    (whole,) = [b for b in table if b.kind == "all"]
    assert whole.tau == pytest.approx(result.tau_replay)
    for kind in ("modality", "position", "length"):
        buckets = [b for b in table if b.kind == kind]
        assert len(buckets) > 2
        assert sum(b.calls for b in buckets) == whole.calls
        assert sum(b.calls * b.tau for b in buckets) == pytest.approx(whole.calls * whole.tau)
    assert [b.name for b in table if b.kind == "modality"] == list(MODALITIES)
    assert sum(b.conversations for b in table if b.kind == "modality") == whole.conversations
    for bucket in table:
        assert bucket.low <= bucket.tau <= bucket.high


def test_calls_are_those_of_the_replay():
    answer = Answer(3, True, np.arange(7), np.array([2, 9, 9, 1, 9, 5, 9]) % 6)
    # The anchor 0 takes 2 and the bonus; 3 takes 1 and the bonus; 5 takes the last token, and there is no bonus.
    calls = replayed_calls([answer], BLOCK_SIZE)
    assert (calls.position.tolist(), calls.generated.tolist()) == ([0, 3, 5], [3, 2, 1])
    assert (calls.sample.tolist(), calls.length.tolist()) == ([3] * 3, [7] * 3)
    assert len(replayed_calls([Answer(0, True, np.arange(1), np.zeros(1, int))], BLOCK_SIZE)) == 0
    forced = forced_calls([answer], BLOCK_SIZE)  # the blocks at 0 and 1 are wholly in it
    assert (forced.position.tolist(), forced.generated.tolist()) == ([0, 1], [3, 4])


def test_teacher_forced_of_a_bucket(result, modality):
    blocks = [n for a in result.answers for n in a.accept_len_at[: max(0, len(a.tokens) - BLOCK_SIZE + 1)]]
    table = tau_table(result, modality)
    whole = table[0]
    assert whole.tau_teacher_forced == pytest.approx(np.mean(blocks) + 1)
    assert whole.slot_acceptance == pytest.approx([np.mean(np.array(blocks) >= k) for k in range(1, BLOCK_SIZE)])
    assert all(b.low_teacher_forced <= b.tau_teacher_forced <= b.high_teacher_forced for b in table)
    late = [n for a in result.answers for n in a.accept_len_at[512 : max(512, len(a.tokens) - BLOCK_SIZE + 1)]]
    (bucket,) = [b for b in table if b.name == "512+"]
    assert bucket.tau_teacher_forced == pytest.approx(np.mean(late) + 1)
    short = EvalResult(
        block_size=BLOCK_SIZE, loss=0.0, accuracy=0.0, slot_accuracy=(), accept_counts=(),
        answers=(Answer(0, True, np.arange(4), np.zeros(4, int)),),
    )  # fmt: skip
    whole = tau_table(short, modality)[0]
    assert (whole.tau, whole.tau_teacher_forced, whole.slot_acceptance) == (1.0, None, ())


def test_a_bucket_measures_its_own_answers(modality):
    """Answers about pictures are never accepted, others always: a wrong bucket would mix them."""
    answers = [Answer(s, True, np.arange(61), np.full(61, 0 if modality[s] else 5)) for s in range(40)]
    result = EvalResult(
        block_size=BLOCK_SIZE, loss=0.0, accuracy=0.0, slot_accuracy=(), accept_counts=(), answers=tuple(answers)
    )
    taus = {b.name: (b.tau, b.low, b.high) for b in tau_table(result, modality) if b.kind == "modality"}
    assert taus == {name: (1.0,) * 3 if i else (6.0,) * 3 for i, name in enumerate(MODALITIES)}


def test_names_of_spans():
    assert span_names(POSITIONS) == ["0-31", "32-127", "128-511", "512+"]
    positions = np.array([0, 31, 32, 511, 512, 9999])
    answers = [Answer(0, True, np.arange(p + 2), np.append(np.full(p, BLOCK_SIZE - 1), [0, 0])) for p in positions]
    result = EvalResult(
        block_size=BLOCK_SIZE, loss=0.0, accuracy=0.0, slot_accuracy=(), accept_counts=(), answers=tuple(answers)
    )
    lengths = [(b.name, b.calls) for b in tau_table(result, np.zeros(1, np.uint8)) if b.kind == "length"]
    assert [name for name, _ in lengths] == ["0-63", "256-1023", "1024+"]


def test_the_interval_covers_the_truth():
    """Conversations of one true ratio: about 95 of 100 intervals hold it. Calls of a conversation go together."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        calls = rng.integers(5, 60, 80).astype(float)
        own = rng.normal(3.0, 0.5, 80)  # a conversation's own tau
        low, high = bootstrap_ratio(calls * own, calls, resamples=400, seed=trial)
        covered += low <= 3.0 <= high
    assert 178 <= covered <= 199
    assert bootstrap_ratio(np.array([4.0]), np.array([2.0])) == (2.0, 2.0)


def test_speedup():
    assert expected_speedup(4.0, target_step=10.0, draft_step=2.0, verify_step=12.0) == pytest.approx(40 / 14)
    with pytest.raises(ValueError, match="--draft-step=0"):
        expected_speedup(4.0, target_step=10.0, draft_step=0, verify_step=12.0)

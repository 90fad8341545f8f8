"""Sampled speculative decoding has the target's own distribution, whatever the draft believes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_target import open_target, write_target

from feature_bridge.decode import greedy
from feature_bridge.draft_files import read_shape
from feature_bridge.sampling import accept_or_resample, draft_distributions, speculate_sampled
from feature_bridge.targets.base import Extended, Request
from feature_bridge.torch_draft import TorchDraft

V = 5
CRITICAL = 1e-4  # a right program fails once in ten thousand runs; seeds are fixed, so it does not


def p_value(counts, probabilities):
    """Of Pearson's chi-square: the survival function of the chi-square distribution with len - 1 degrees."""
    counts, expected = np.asarray(counts, float), np.asarray(probabilities, float) * np.sum(counts)
    assert expected.min() > 5, "too few draws for the test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


def distributions(rows, seed, sharpness=1.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(rows, V, generator=generator), -1)


def test_the_test_finds_a_wrong_distribution():
    p = distributions(1, 0)[0].numpy()
    rng = np.random.default_rng(0)
    assert p_value(rng.multinomial(4000, p), p) > CRITICAL
    assert p_value(rng.multinomial(4000, 0.8 * p + 0.2 / V), p) < CRITICAL


def test_each_place_has_the_targets_distribution():
    q, p = distributions(2, 1), distributions(3, 2)
    generator = torch.Generator().manual_seed(3)
    first, second, third = np.zeros(V), np.zeros(V), np.zeros(V)
    for _ in range(6000):
        proposed = [int(torch.multinomial(row, 1, generator=generator)) for row in q]
        accepted, own = accept_or_resample(proposed, q, p, generator)
        tokens = [*proposed[:accepted], own]
        for counts, token in zip((first, second, third), tokens, strict=False):
            counts[token] += 1
    assert first.sum() == 6000
    assert 500 < third.sum() < second.sum() < 6000
    for counts, row in zip((first, second, third), p, strict=True):
        assert p_value(counts, row) > CRITICAL


def test_the_same_distribution_is_always_accepted():
    p = distributions(4, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        proposed = [int(torch.multinomial(row, 1, generator=generator)) for row in p[:3]]
        assert accept_or_resample(proposed, p[:3], p, generator)[0] == 3


class ChainTarget:
    """A target whose next token depends on the last one alone: its distributions of whole answers are exact sums."""

    def __init__(self, seed):
        self.table = 1.2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
        self.config = SimpleNamespace()
        self.max_tokens = 100

    def extend(self, requests, *, last_hidden=False):
        tokens = torch.cat([torch.from_numpy(request.tokens).long() for request in requests])
        one_hot = torch.nn.functional.one_hot(tokens, V).float()
        return Extended(one_hot, one_hot)

    def logits(self, hidden):
        return hidden @ self.table


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_whole_answers_have_the_targets_distribution(temperature):
    target = ChainTarget(seed=1)
    q = distributions(3, 8)
    prompts = [Request(tokens=np.array([2], np.int32))] * 5000
    answers = speculate_sampled(
        target, lambda tokens, features: q, prompts, {4}, 3, temperature=temperature, seed=11
    )  # token 4 ends an answer
    step = torch.softmax(target.table / temperature, -1).double().numpy()
    expected = {}
    for a in range(V):
        for b in range(V) if a != 4 else [None]:
            for c in range(V) if b not in (4, None) else [None]:
                tokens = tuple(t for t in (a, b, c) if t is not None)
                expected[tokens] = np.prod([step[i, j] for i, j in zip((2, *tokens), tokens, strict=False)])
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for answer in answers:
        counts[answer.tokens] += 1
    often = [tokens for tokens, p in expected.items() if p * len(answers) > 10]
    rest = len(answers) - sum(counts[t] for t in often), 1 - sum(expected[t] for t in often)
    assert p_value([*(counts[t] for t in often), rest[0]], [*(expected[t] for t in often), rest[1]]) > CRITICAL
    lens = [n for answer in answers for n in answer.accept_lens]
    assert 0 in lens
    assert max(lens) >= 2  # both branches were taken


def test_seeds_and_limits():
    target, q = ChainTarget(seed=1), distributions(3, 8)
    prompts = [Request(tokens=np.array([0, 1], np.int32))] * 3
    run = [speculate_sampled(target, lambda *_: q, prompts, set(), 7, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert run[0] == run[1] != run[2]
    for answer in run[0]:
        assert len(answer.tokens) == 7
        assert 6 <= sum(answer.accept_lens) + len(answer.accept_lens) <= 7


def test_a_real_draft_at_a_low_temperature_decodes_greedily(tmp_path):
    from test_decode import random_draft

    target = open_target(write_target(tmp_path), layer_ids=(0, 2))
    config, weights = random_draft(32, (0, 2), 10, 11)
    draft = TorchDraft(read_shape(config), weights)
    prompts = [Request(tokens=np.arange(n, dtype=np.int32) % 11) for n in (3, 8)]
    propose = draft_distributions(draft, target, 1e-3)
    answers = speculate_sampled(target, propose, prompts, set(), 9, temperature=1e-3, seed=0)
    assert [a.tokens for a in answers] == greedy(target, prompts, set(), 9)
    soft = draft_distributions(draft, target, 1.0)([1, 2, 3], target.extend([prompts[0]]).features[:2])
    assert soft.shape == (4, 11)
    torch.testing.assert_close(soft.sum(-1), torch.ones(4))

"""Replay against a literal simulation of greedy speculative decoding with a fixed target answer and a fixed draft."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdraft.replay import anchors_of, mean_tau, replay, tau


def simulate(answer, proposals, block_size):
    """Decode token by token: `proposals[a]` is what the draft proposes after answer[a]. Returns accepted counts."""
    text, accept_lens = [answer[0]], []
    while len(text) < len(answer):
        draft, accepted = proposals[len(text) - 1][: block_size - 1], 0
        for token in draft:
            if len(text) == len(answer) or token != answer[len(text)]:
                break
            text.append(token)
            accepted += 1
        accept_lens.append(accepted)
        if len(text) < len(answer):
            text.append(answer[len(text)])  # the bonus token
    return tuple(accept_lens)


@given(data=st.data(), block_size=st.integers(2, 7), length=st.integers(1, 40), prompt=st.integers(0, 5))
def test_equals_a_simulation(data, block_size, length, prompt):
    tokens = st.integers(0, 2)  # a small vocabulary: drafts are often right
    answer = data.draw(st.lists(tokens, min_size=length, max_size=length))
    proposals = data.draw(
        st.lists(st.lists(tokens, min_size=block_size, max_size=block_size), min_size=length, max_size=length)
    )
    counts = np.zeros(prompt + length + 3, np.int32)  # raw matches, not cut at the answer's end
    for a in range(length):
        after = answer[a + 1 :] + [0] * block_size
        while counts[prompt + a] < block_size - 1 and proposals[a][counts[prompt + a]] == after[counts[prompt + a]]:
            counts[prompt + a] += 1
    got = replay(counts, prompt, prompt + length, block_size)
    assert got == simulate(answer, proposals, block_size)
    drafted_and_bonus = sum(got) + len(got)
    assert length - 1 <= drafted_and_bonus <= length - 1 + (len(got) > 0)  # the last call may have no bonus token


def test_the_end_of_the_answer():
    perfect = np.full(20, 3)  # block_size 4, every draft token right
    assert replay(perfect, 0, 1, 4) == ()  # the prefill gave the only token
    assert replay(perfect, 5, 5, 4) == ()
    assert replay(perfect, 0, 2, 4) == (1,)  # one draft token, no bonus after the last
    assert replay(perfect, 0, 4, 4) == (3,)
    assert replay(perfect, 0, 5, 4) == (3,)  # three draft tokens and the bonus
    assert replay(perfect, 0, 6, 4) == (3, 1)
    assert replay(np.zeros(20, int), 2, 6, 4) == (0, 0, 0)


def test_only_visited_anchors_count():
    counts = np.array([9, 2, 9, 9, 0, 1, 9, 9])
    assert replay(counts, 1, 8, 10) == (2, 0, 1)
    assert anchors_of((2, 0, 1), 1) == (1, 4, 5)


def test_tau_is_pooled_and_ignores_empty_answers():
    assert tau([11, 4, 1, 0], [5, 1, 0, 0]) == pytest.approx(13 / 6)
    assert mean_tau([11, 4, 1], [5, 1, 0]) == pytest.approx((10 / 5 + 3 / 1) / 2)
    assert np.isnan(tau([1], [0]))
    assert np.isnan(mean_tau([1], [0]))

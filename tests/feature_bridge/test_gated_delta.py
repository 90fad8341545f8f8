"""The chunked gated delta rule and the convolution of the CPU stand-ins, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from feature_bridge.cpu_stand_ins.gated_delta import causal_convolution, gated_delta_rule, gated_delta_rule_sequential


def random_row(lengths: list[int], heads: int, dim_k: int, dim_v: int):
    total = sum(lengths)
    q, k = (F.normalize(torch.randn(total, heads, dim_k), dim=-1) for _ in range(2))
    v = torch.randn(total, heads, dim_v)
    g = -F.softplus(torch.randn(total, heads) * 3)  # decays from none to almost total
    beta = torch.sigmoid(torch.randn(total, heads))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return q, k, v, g, beta, starts


@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [200], [1, 130, 64, 7], [3, 5, 2]])
def test_chunked_equals_the_recurrence(lengths):
    row = random_row(lengths, heads=3, dim_k=24, dim_v=40)
    out, states = gated_delta_rule(*row)
    want, want_states = gated_delta_rule_sequential(*row)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, want_states, rtol=1e-5, atol=1e-5)


def test_sequences_of_a_row_do_not_see_each_other():
    q, k, v, g, beta, starts = random_row([70, 90], heads=2, dim_k=16, dim_v=16)
    together, _ = gated_delta_rule(q, k, v, g, beta, starts)
    alone, _ = gated_delta_rule(q[70:], k[70:], v[70:], g[70:], beta[70:], torch.tensor([0, 90]))
    torch.testing.assert_close(together[70:], alone, rtol=1e-6, atol=1e-6)


def test_strong_decay_stays_finite():
    q, k, v, g, beta, starts = random_row([130], heads=2, dim_k=16, dim_v=16)
    out, states = gated_delta_rule(q, k, v, g - 50, beta, starts)
    want, _ = gated_delta_rule_sequential(q, k, v, g - 50, beta, starts)
    assert torch.isfinite(states).all()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_equals_conv1d_of_each_sequence(with_bias):
    lengths, channels, taps = [1, 3, 20, 2], 6, 4
    x, weight = torch.randn(channels, sum(lengths)), torch.randn(channels, taps)
    bias = torch.randn(channels) if with_bias else None
    got = causal_convolution(x, weight, bias, torch.tensor([0, *lengths]).cumsum(0))
    want = [
        F.conv1d(F.pad(part, (taps - 1, 0))[None], weight[:, None], bias, groups=channels)[0]
        for part in x.split(lengths, dim=1)
    ]
    torch.testing.assert_close(got, torch.cat(want, dim=1), rtol=1e-5, atol=1e-6)

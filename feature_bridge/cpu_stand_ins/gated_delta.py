"""The gated delta rule and the short causal convolution of Qwen3.5's linear attention, in plain torch.

Legend: T tokens of a packed row, N sequences in it, C tokens of a chunk, M chunks, H heads, K key dim, V value dim,
D channels, W taps of the convolution. `starts` [N + 1] are the sequences' bounds (cumulative lengths from 0).

The rule, per head, from S = 0 (Yang et al., "Gated Delta Networks", eq. 10):

    S <- exp(g_t) S;   d_t = beta_t (v_t - S^T k_t);   S <- S + k_t d_t^T;   o_t = S^T q_t

`gated_delta_rule` computes it chunk by chunk (their eq. 11-12): inside a chunk the d_t solve a unit lower triangular
system, batched over all chunks and heads; only the state is carried from chunk to chunk.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 64


def gated_delta_rule(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T H K"],
    v: Float[Tensor, "T H V"],
    g: Float[Tensor, "T H"],
    beta: Float[Tensor, "T H"],
    starts: Int[Tensor, " bounds"],
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "N H K V"]]:
    """Outputs of every token and the final state of every sequence, in fp32. `g` is the log of the decay; q is scaled.

    Sequences do not see each other: each is padded to whole chunks (g = beta = k = 0 leaves the state alone).
    """
    lengths = starts.diff()
    chunks_n = (lengths + CHUNK - 1) // CHUNK
    first_chunk_n = chunks_n.cumsum(0) - chunks_n
    sequence_t = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place_t = first_chunk_n[sequence_t] * CHUNK + torch.arange(len(sequence_t)) - starts[sequence_t]
    num_chunks = int(chunks_n.sum())

    def chunked(x: Tensor) -> Tensor:
        """[T, H, ...] -> [M, H, C, ...], zero where there is no token."""
        padded = x.new_zeros(num_chunks * CHUNK, *x.shape[1:], dtype=torch.float32)
        padded[place_t] = x.float()
        return padded.unflatten(0, (num_chunks, CHUNK)).transpose(1, 2).contiguous()

    q_mhck, k_mhck, v_mhcv, g_mhc, beta_mhc = (chunked(x) for x in (q, k, v, g, beta))
    decay_mhc = g_mhc.cumsum(-1)  # log of the decay since the chunk's start
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    # decay from token j (last dim) to token i, 0 where j is later
    pair_mhcc = (decay_mhc[..., :, None] - decay_mhc[..., None, :]).masked_fill(later, -torch.inf).exp()

    # d = T (beta v) - T (beta exp(decay) k) S, with T = (I + tril(beta k k^T * pair, -1))^-1
    k_beta = k_mhck * beta_mhc[..., None]
    system = torch.einsum("mhik,mhjk->mhij", k_beta, k_mhck).mul_(pair_mhcc).tril(-1)
    right = torch.cat([v_mhcv * beta_mhc[..., None], k_beta * decay_mhc.exp()[..., None]], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_v, new_k = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    inside = torch.einsum("mhik,mhjk->mhij", q_mhck, k_mhck).mul_(pair_mhcc)
    q_decayed = q_mhck * decay_mhc.exp()[..., None]
    k_to_end = k_mhck * (decay_mhc[..., -1:] - decay_mhc).exp()[..., None]
    chunk_decay = decay_mhc[..., -1].exp()[..., None, None]

    out_mhcv = torch.empty_like(v_mhcv)
    states = v_mhcv.new_zeros(len(lengths), v.shape[1], k.shape[-1], v.shape[-1])
    for n, (first, count) in enumerate(zip(first_chunk_n.tolist(), chunks_n.tolist(), strict=True)):
        state_hkv = states[n]
        for m in range(first, first + count):
            d_hcv = torch.baddbmm(new_v[m], new_k[m], state_hkv, alpha=-1)
            out_mhcv[m] = torch.baddbmm(torch.bmm(q_decayed[m], state_hkv), inside[m], d_hcv)
            state_hkv = torch.baddbmm(state_hkv * chunk_decay[m], k_to_end[m].transpose(1, 2), d_hcv)
        states[n] = state_hkv
    return out_mhcv.transpose(1, 2).flatten(0, 1)[place_t], states


def gated_delta_rule_sequential(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T H K"],
    v: Float[Tensor, "T H V"],
    g: Float[Tensor, "T H"],
    beta: Float[Tensor, "T H"],
    starts: Int[Tensor, " bounds"],
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "N H K V"]]:
    """The same, token by token as the definition reads: the reference the tests hold `gated_delta_rule` against."""
    out, states = [], []
    for start, end in pairwise(starts.tolist()):
        state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None]
            d_hv = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + torch.einsum("hk,hv->hkv", k[t], d_hv)
            out.append(torch.einsum("hkv,hk->hv", state, q[t]))
        states.append(state)
    return torch.stack(out), torch.stack(states)


def causal_convolution(
    x: Float[Tensor, "D T"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    starts: Int[Tensor, " bounds"],
) -> Float[Tensor, "D T"]:
    """Depthwise convolution over the last W tokens of the same sequence, in fp32.

    A sum over the taps, each with the tokens of another sequence zeroed: every token's value is the same to the bit
    whatever else is in the row.
    """
    num_tokens, taps = x.shape[1], weight.shape[1]
    position_t = torch.arange(num_tokens) - torch.repeat_interleave(starts[:-1], starts.diff())
    x, weight = x.float(), weight.float()
    out = x * weight[:, -1:]
    for back in range(1, taps):
        earlier = F.pad(x, (back, 0))[:, :num_tokens] * (position_t >= back)
        out += earlier * weight[:, taps - 1 - back, None]
    return out if bias is None else out + bias.float()[:, None]

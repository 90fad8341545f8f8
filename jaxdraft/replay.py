"""The exact walk of greedy speculative decoding over an answer that is already known.

Greedy decoding that loses nothing emits the target's own greedy answer, whatever the draft proposes. So the anchors
that decoding visits are fixed by how many draft tokens each anchor would get accepted: one pass over prompt + answer
gives that count at every position, and walking it gives the accepted lengths, verify call by verify call.

The counting, the same in `feature_bridge.decode`:
- the answer's first token comes from the prefill; it is the first anchor and costs no verify call;
- a verify call at anchor a accepts n draft tokens a+1 .. a+n and adds the target's own next token: the next anchor;
- the answer ends with its last token (the end of the turn, or the limit of new tokens): what a block proposes beyond
  it counts for nothing, and no call is made at the last token. A draft token that is the last gets no bonus token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int


def replay(
    accept_len_at: Int[np.ndarray, " S"], answer_start: int, answer_end: int, block_size: int
) -> tuple[int, ...]:
    """Accepted draft tokens of each verify call while decoding the answer [answer_start, answer_end) of one sample.

    Args:
      accept_len_at: at position a, how many of the draft tokens proposed from anchor a equal the sample's next tokens,
        0 .. block_size - 1. Only the anchors that decoding visits are read.
      answer_start: position of the answer's first token.
      answer_end: one past the answer's last token.
      block_size: slots of a block, the anchor's included.

    Returns:
      One count a verify call, without the bonus token; empty for an answer of at most one token.
    """
    assert 0 <= answer_start <= answer_end <= len(accept_len_at), (answer_start, answer_end, len(accept_len_at))
    accept_lens = []
    anchor, last = answer_start, answer_end - 1
    while anchor < last:
        accept_len = min(int(accept_len_at[anchor]), last - anchor)
        assert 0 <= accept_len < block_size, f"accept_len {accept_len} at {anchor} with block_size {block_size}"
        accept_lens.append(accept_len)
        anchor += accept_len + 1
    return tuple(accept_lens)


def anchors_of(accept_lens: Sequence[int], answer_start: int) -> tuple[int, ...]:
    """The anchors a walk visited, from its accepted lengths."""
    steps = np.cumsum([answer_start, *(n + 1 for n in accept_lens)])
    return tuple(int(a) for a in steps[:-1])


def tau(generated: Iterable[int], verify_calls: Iterable[int]) -> float:
    """Tokens generated after each answer's first, over the target's verify calls, pooled over answers.

    Args:
      generated: tokens of each answer, its first token included.
      verify_calls: verify calls of each answer.

    Returns:
      NaN where no verify call was made.
    """
    tokens = sum(max(length - 1, 0) for length in generated)
    calls = sum(verify_calls)
    return tokens / calls if calls else float("nan")


def mean_tau(generated: Iterable[int], verify_calls: Iterable[int]) -> float:
    """The mean of the answers' own taus, as z-lab reports it; answers without a verify call are left out."""
    taus = [(length - 1) / calls for length, calls in zip(generated, verify_calls, strict=True) if calls]
    return float(np.mean(taus)) if taus else float("nan")

"""Answers while they are generated: what greedy (`decode`) and sampled (`sampling`) speculative decoding share.

Legend: N conversations, K proposed tokens, A context tokens = the anchor's position, V vocabulary, W feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bridge.targets.base import Request, Target, split_lengths
from feature_bridge.torch_draft import TorchDraft


@dataclass(frozen=True)
class Generated:
    """One answer through its end-of-turn token, and the draft tokens accepted in each verify call."""

    tokens: tuple[int, ...]
    accept_lens: tuple[int, ...]


@dataclass(eq=False)
class Conversation:
    """One answer while it is generated."""

    prompt: Request
    limit: int  # tokens it may generate
    answer: list[int] = field(default_factory=list)
    accept_lens: list[int] = field(default_factory=list)
    features: Tensor | None = None  # [A, W], of prompt and answer without its last token, the anchor
    stopped: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt.tokens.tolist() + self.answer

    @property
    def generated(self) -> Generated:
        return Generated(tuple(self.answer), tuple(self.accept_lens))

    def request(self, tokens: list[int]) -> Request:
        return dataclasses.replace(self.prompt, tokens=np.asarray(tokens, np.int32))

    def append(self, tokens: list[int], stop: Collection[int]) -> int:
        """Adds generated tokens up to the end of the turn or the limit; returns how many were added."""
        added = 0
        for token in tokens:
            self.answer.append(token)
            added += 1
            self.stopped = token in stop or len(self.answer) == self.limit
            if self.stopped:
                break
        return added

    def append_verified(self, tokens: list[int], accepted: int, features: Tensor, stop: Collection[int]) -> None:
        """Adds what a verify call gave: the accepted draft tokens and the target's own; `features` of all it read."""
        added = self.append(tokens, stop)
        self.accept_lens.append(min(accepted, added))
        self.features = features[: len(self.tokens) - 1]


def start(target: Target, prompts: Sequence[Request], max_new_tokens: int) -> list[Conversation]:
    """A conversation for each prompt, not answered yet. The target's context is a limit as well."""
    limits = [min(max_new_tokens, target.max_tokens - len(prompt.tokens)) for prompt in prompts]
    assert all(limit > 0 for limit in limits), "a prompt fills the target's whole context"
    return [Conversation(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]


def extend(
    target: Target, requests: Sequence[Request], num_last: Sequence[int], read: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """One extend over all requests.

    Args:
      num_last: of each request, its last tokens whose successors are asked for.
      read: makes of the target's logits [n, V] after these tokens what is wanted of them, [n, ...].

    Returns:
      For each request its features, and its part of what `read` gave.
    """
    if not requests:
        return []
    extended = target.extend(requests, last_hidden=True)
    lengths = split_lengths(requests)
    last = [states[-num:] for states, num in zip(extended.hidden.split(lengths), num_last, strict=True)]
    wanted = read(target.logits(torch.cat(last))).split(list(num_last))
    return list(zip(extended.features.split(lengths), wanted, strict=True))


def block_logits(draft: TorchDraft, target: Target) -> Callable[[list[int], Tensor], Float[Tensor, "K V"]]:
    """A function (tokens, features [A, W]) -> logits of the target's head on the draft's block after `tokens`.

    The last of `tokens` is the anchor, and the features are of those before it. The draft's own factor and cap on the
    logits are not applied yet: see `TorchDraft.scale_logits`.
    """
    shape = draft.shape
    masks = [shape.mask_token_id] * (shape.block_size - 1)
    dtype = draft.weights["norm.weight"].dtype

    @torch.inference_mode()
    def logits(tokens: list[int], features: Tensor) -> Tensor:
        embedding_bh = draft.scale_embedding(target.embed([tokens[-1], *masks]).to(dtype))
        hidden_bh = draft(embedding_bh, features.to(dtype))
        return target.logits(hidden_bh[1:])

    return logits

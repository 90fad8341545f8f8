"""Speculative decoding at a temperature: sampling with rejection, which gives the target's own distribution exactly.

A draft token x, drawn from q, is accepted with probability min(1, p(x) / q(x)); the first one that is not is replaced
by a draw from the normalised max(p - q, 0), and after a block that was accepted whole comes a draw from p (Leviathan et
al., "Fast Inference from Transformers via Speculative Decoding", theorem 1; Chen et al. 2023, algorithm 2). The slots
of a DFlash block are drawn independently of each other: q of a slot does not depend on the slots before it, and the
theorem asks for nothing else.

Legend: K proposed tokens, V vocabulary, A context tokens, W feature width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bridge.generation import Generated, block_logits, extend, start
from feature_bridge.targets.base import Request, Target, placeholder_ids
from feature_bridge.torch_draft import TorchDraft


class SamplingProposer(Protocol):
    """A draft as sampled decoding sees it."""

    def __call__(self, tokens: list[int], features: Tensor) -> Float[Tensor, "K V"]:
        """The draft's distributions of the tokens after `tokens`, from the features [A, W] before the last of them."""


def draft_distributions(draft: TorchDraft, target: Target, temperature: float) -> SamplingProposer:
    """The exported draft's distributions at a temperature. Placeholders of pictures have no probability."""
    logits = block_logits(draft, target)
    placeholders = sorted(placeholder_ids(target.config))

    @torch.inference_mode()
    def propose(tokens: list[int], features: Tensor) -> Tensor:
        scaled = draft.scale_logits(logits(tokens, features).float())
        scaled[:, placeholders] = -torch.inf
        return torch.softmax(scaled / temperature, dim=-1)

    return propose


def accept_or_resample(
    proposed: Sequence[int], draft: Float[Tensor, "K V"], target: Float[Tensor, "K+1 V"], generator: torch.Generator
) -> tuple[int, int]:
    """How many of the proposed tokens are accepted, and the target's token after them.

    Args:
      proposed: K tokens, each drawn from its row of `draft`.
      draft: the distributions that they were drawn from.
      target: the target's distributions at the same places, and after the last.
    """
    for k, token in enumerate(proposed):
        p, q = target[k, token], draft[k, token]
        if torch.rand((), generator=generator) * q < p:
            continue
        rest = (target[k] - draft[k]).clamp_min(0)
        # Nothing is left where p equals q up to rounding: then p itself is right.
        return k, _draw(rest if rest.sum() > 0 else target[k], generator)
    return len(proposed), _draw(target[len(proposed)], generator)


def speculate_sampled(
    target: Target,
    propose: SamplingProposer,
    prompts: Sequence[Request],
    stop: Collection[int],
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
) -> list[Generated]:
    """Sampled speculative decoding of every prompt. Arguments as of `decode.speculate`; one generator for all."""
    generator = torch.Generator().manual_seed(seed)
    conversations = start(target, prompts, max_new_tokens)
    stop = placeholder_ids(target.config) | set(stop)
    first = _extend(target, [c.prompt for c in conversations], [1] * len(conversations), temperature)
    for c, (features, p) in zip(conversations, first, strict=True):
        c.append([_draw(p[0], generator)], stop)
        c.features = features
    while active := [c for c in conversations if not c.stopped]:
        drafts, proposals = [], []
        for c in active:
            q = propose(c.tokens, c.features)[: c.limit - len(c.answer)].cpu()
            drafts.append(q)
            proposals.append([_draw(row, generator) for row in q])
        requests = [c.request(c.tokens + proposal) for c, proposal in zip(active, proposals, strict=True)]
        verified = _extend(target, requests, [len(p) + 1 for p in proposals], temperature)
        for c, q, proposal, (features, p) in zip(active, drafts, proposals, verified, strict=True):
            accepted, own = accept_or_resample(proposal, q, p, generator)
            c.append_verified([*proposal[:accepted], own], accepted, features, stop)
    return [c.generated for c in conversations]


def _draw(weights: Float[Tensor, " V"], generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _extend(
    target: Target, requests: Sequence[Request], num_last: Sequence[int], temperature: float
) -> list[tuple[Tensor, Float[Tensor, "n V"]]]:
    """For each request its features, and the target's distributions after each of its last `num_last` tokens."""
    return extend(target, requests, num_last, lambda x: torch.softmax(x.float() / temperature, dim=-1).cpu())

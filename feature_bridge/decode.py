"""Real speculative decoding with a draft, to measure it, and the target's own greedy decoding for comparison.

    prefill -> the answer's first token, the first anchor
    draft proposes B-1 tokens -> one extend over prompt + answer so far + proposal -> accept the n that the target
    agrees with and add its own next token, the next anchor -> ... -> end of turn, or the limit

Every extend is a prefill from the start. That costs more than decoding with a cache and needs none: cutting rejected
tokens out of a cache goes wrong silently with linear-attention layers. Conversations advance together, with one ragged
extend a round. The counting is that of `jaxdraft.replay`.

Legend: N conversations, A context tokens = the anchor's position, B block slots, W feature width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from feature_bridge.contracts import Decode, Decoded, DecodedSample
from feature_bridge.generation import Conversation, Generated, block_logits, extend, start
from feature_bridge.index import Index
from feature_bridge.processors import Processor
from feature_bridge.requests import request_of
from feature_bridge.samples import Sample
from feature_bridge.sampling import draft_distributions, speculate_sampled
from feature_bridge.targets.base import Request, Target, placeholder_ids
from feature_bridge.targets.probe import TOLERANCE
from feature_bridge.torch_draft import TorchDraft


def decode(target: Target, processor: Processor, index: Index, request: Decode) -> Decoded:
    """Decode the last turn of held-out conversations with an exported draft, and, if greedily, by the target alone too.

    Raises:
      ValueError: no such draft, or one for other layers.
      MediaError: a conversation's pictures are gone or broken.
    """
    began = time.monotonic()
    embedding = target.embed([0])
    draft = TorchDraft.load(request.draft_path, dtype=embedding.dtype, device=embedding.device)
    propose = draft_proposer(draft, target)
    prompts = [prompt_of(index.sample(position), processor) for position in request.samples]
    stop = processor.eos_token_ids
    if request.temperature > 0:
        distributions = draft_distributions(draft, target, request.temperature)
        options = {"temperature": request.temperature, "seed": request.seed}
        generated = speculate_sampled(target, distributions, prompts, stop, request.max_new_tokens, **options)
        alone = [()] * len(prompts)  # another draw of the target would be another text
    else:
        generated = speculate(target, propose, prompts, stop, request.max_new_tokens)
        alone = _greedy_once(target, index, request, prompts, stop)
    return Decoded(
        request_id=request.request_id,
        samples=tuple(
            DecodedSample(
                sample=position,
                tokens=g.tokens,
                target_tokens=tokens,
                accept_lens=g.accept_lens,
                near_tie=part_at_a_near_tie(target, prompt, g.tokens, tokens),
            )
            for position, prompt, g, tokens in zip(request.samples, prompts, generated, alone, strict=True)
        ),
        seconds=time.monotonic() - began,
    )


# The target's own answers do not depend on the draft, and a run decodes the same conversations with several.
_answers: WeakKeyDictionary[Target, dict[tuple[str, int, int], tuple[int, ...]]] = WeakKeyDictionary()


def _greedy_once(
    target: Target, index: Index, request: Decode, prompts: Sequence[Request], stop: Collection[int]
) -> list[tuple[int, ...]]:
    known = _answers.setdefault(target, {})
    keys = [(index.digest, position, request.max_new_tokens) for position in request.samples]
    new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    known.update(zip(new, greedy(target, list(new.values()), stop, request.max_new_tokens), strict=True))
    return [known[key] for key in keys]


def part_at_a_near_tie(target: Target, prompt: Request, a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two answers first differ in tokens whose logits the target cannot tell apart.

    An extend of another length rounds otherwise, and two bfloat16 logits are often a unit in the last place apart: then
    speculative decoding and the target alone may each take another one, and both are right.
    """
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return False
    request = dataclasses.replace(prompt, tokens=np.concatenate([prompt.tokens, np.int32(a[:at])]))
    ((_, logits),) = extend(target, [request], [1], lambda logits: logits)
    scores, limit = logits[0].float(), TOLERANCE[logits.dtype]
    behind = scores.max() - scores[[a[at], b[at]]].min()
    return bool(behind <= limit * scores.abs().max())


def prompt_of(sample: Sample, processor: Processor) -> Request:
    """The prompt of the sample's last answer: its tokens through the generation prompt, with their pictures and videos.

    Raises MediaError: a picture or video is gone or broken.
    """
    end, _ = sample.last_answer
    return request_of(sample, processor, end=end)


class Proposer(Protocol):
    """A draft as the decoder sees it."""

    def __call__(self, tokens: list[int], features: Tensor) -> list[int]:
        """B-1 tokens proposed to follow `tokens`, whose last is the anchor, from the features [A, W] before it."""


def speculate(
    target: Target, propose: Proposer, prompts: Sequence[Request], stop: Collection[int], max_new_tokens: int
) -> list[Generated]:
    """Greedy speculative decoding of every prompt, whatever the draft proposes.

    Args:
      prompts: through the generation prompt; their pictures are all in there.
      stop: token ids that end a turn. A placeholder of a picture ends it as well: a target cannot read it as text.
      max_new_tokens: of each answer.
    """
    conversations = start(target, prompts, max_new_tokens)
    placeholders = placeholder_ids(target.config)
    stop = placeholders | set(stop)
    _prefill(target, conversations, stop)
    while active := [c for c in conversations if not c.stopped]:
        proposals = [_usable(propose(c.tokens, c.features), c, placeholders) for c in active]
        requests = [c.request(c.tokens + proposal) for c, proposal in zip(active, proposals, strict=True)]
        verified = _extend(target, requests, [len(proposal) + 1 for proposal in proposals])
        for c, proposal, (features, choices) in zip(active, proposals, verified, strict=True):
            agreed = [drafted == chosen for drafted, chosen in zip(proposal, choices, strict=False)]
            accepted = agreed.index(False) if False in agreed else len(agreed)
            c.append_verified([*proposal[:accepted], choices[accepted]], accepted, features, stop)
    return [c.generated for c in conversations]


def greedy(
    target: Target, prompts: Sequence[Request], stop: Collection[int], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """The target's own greedy answers without a draft, one token for each extend. Arguments as of `speculate`."""
    conversations = start(target, prompts, max_new_tokens)
    stop = placeholder_ids(target.config) | set(stop)
    while active := [c for c in conversations if not c.stopped]:
        requests = [c.request(c.tokens) for c in active]
        for c, (_, choices) in zip(active, _extend(target, requests, [1] * len(active)), strict=True):
            c.append(choices, stop)
    return [tuple(c.answer) for c in conversations]


def draft_proposer(draft: TorchDraft, target: Target) -> Proposer:
    """The exported draft, between the target's own embedding and head.

    Raises:
      ValueError: the draft reads other layers than the target captures.
    """
    shape = draft.shape
    if shape.target_layer_ids != target.layer_ids:
        raise ValueError(
            f"the draft reads layers {list(shape.target_layer_ids)} but this bridge captures {list(target.layer_ids)}; "
            "start the bridge with the draft's own layers"
        )
    logits = block_logits(draft, target)

    def propose(tokens: list[int], features: Tensor) -> list[int]:
        return draft.scale_logits(logits(tokens, features)).argmax(-1).tolist()

    return propose


def _usable(proposal: list[int], conversation: Conversation, placeholders: Collection[int]) -> list[int]:
    """The part of a proposal that can be verified: within the limit, and before any placeholder (never accepted)."""
    wrong = (k for k, token in enumerate(proposal) if token in placeholders)
    return proposal[: min(conversation.limit - len(conversation.answer), next(wrong, len(proposal)))]


def _prefill(target: Target, conversations: list[Conversation], stop: Collection[int]) -> None:
    prompts = [c.prompt for c in conversations]
    for c, (features, choices) in zip(conversations, _extend(target, prompts, [1] * len(prompts)), strict=True):
        c.append(choices, stop)
        c.features = features


def _extend(target: Target, requests: Sequence[Request], num_last: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
    """For each request its features, and the target's greedy choice after each of its last `num_last` tokens."""
    extended = extend(target, requests, num_last, lambda logits: logits.argmax(-1))
    return [(features, choices.tolist()) for features, choices in extended]

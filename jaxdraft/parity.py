"""One draft in several systems: what each makes of the same blocks, compared with the JAX draft that was trained.

Legend: C conversations, S tokens, W feature width, N blocks of a conversation, B block slots, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from jaxdraft.bridges import Bridge
from jaxdraft.export import digest
from jaxdraft.features import Slot
from jaxdraft.model.dflash import DraftConfig, bind, block_input_embeddings
from jaxdraft.model.tensors import to_tensors
from jaxdraft.objective import Frozen, Params

TOLERANCE = 1e-4  # of hidden states and logits, relative to the largest one: float32 in another order of summation
SYSTEMS = {"dflash": ("torch", "z-lab", "specforge", "sglang"), "speculators": ("speculators",)}  # by form of the draft
FIELDS = (
    "block_size",
    "target_layer_ids",
    "mask_token_id",
    "rope_theta",
    "rms_norm_eps",
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
)
DEFAULTS = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": 0.0}  # of None


@dataclass(frozen=True, eq=False)
class Conversation:
    """One sample with its features, and the anchors of the blocks that are compared."""

    name: str
    tokens: Int[np.ndarray, " S"]
    features: Float[np.ndarray, "S W"]
    anchors: Int[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """What a draft says at a conversation's anchors."""

    hidden: Float[np.ndarray, "N B H"]
    logits: Float[np.ndarray, "N slots V"]  # of slots 1..B-1

    @property
    def proposed(self) -> Int[np.ndarray, "N slots"]:
        return self.logits.argmax(-1)

    @property
    def gap(self) -> Float[np.ndarray, "N slots"]:
        """Between the two largest logits."""
        two = np.partition(self.logits, -2, axis=-1)[..., -2:]
        return two[..., 1] - two[..., 0]

    def accept_lens(self, conversation: Conversation) -> Int[np.ndarray, " N"]:
        """Leading proposed tokens that are the conversation's own."""
        at = conversation.anchors[:, None] + 1 + np.arange(self.logits.shape[1])
        inside = at < len(conversation.tokens)
        hits = inside & (self.proposed == conversation.tokens[np.minimum(at, len(conversation.tokens) - 1)])
        return np.cumprod(hits, axis=-1).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One row of the table.

    Attributes:
      system: its name.
      status: "same", "differs", "failed" (it did not load or run), "not installed" or "not run".
      difference: the first thing that differs, by name; empty where nothing does.
      error: of the logits, relative to the largest; None where there are none.
      same_blocks, blocks: proposed blocks equal to the JAX draft's, and all.
      near_ties: blocks that differ only in slots whose two largest logits are closer than the tolerance.
      accept_len: mean accepted draft tokens of these blocks, without the bonus token.
    """

    system: str
    status: str
    note: str = ""
    difference: str = ""
    error: float | None = None
    same_blocks: int = 0
    blocks: int = 0
    near_ties: int = 0
    accept_len: float | None = None

    @property
    def failed(self) -> bool:
        return self.status in ("differs", "failed")


# --- the JAX draft ----------------------------------------------------------------------------------------------------


def jax_blocks(
    params: Params, draft: DraftConfig, frozen: Frozen, conversations: Sequence[Conversation]
) -> list[Blocks]:
    """The draft as it is trained, in float32, on the conversations as rows of one batch."""
    longest = max(len(c.tokens) for c in conversations)
    most = max(len(c.anchors) for c in conversations)

    def pad(array: np.ndarray, size: int) -> np.ndarray:
        return np.pad(array, ((0, size - len(array)), *[(0, 0)] * (array.ndim - 1)))

    tokens, features, anchors = (
        np.stack([pad(getattr(c, name), size) for c in conversations])
        for name, size in (("tokens", longest), ("features", longest), ("anchors", most))
    )
    valid = np.arange(most) < np.array([[len(c.anchors)] for c in conversations])
    hidden = np.asarray(_forward(params, frozen.embedding, tokens, features, anchors, valid, draft=draft))
    hidden = [h[: len(c.anchors)] for h, c in zip(hidden, conversations, strict=True)]
    return [Blocks(h, head_logits(h, frozen, draft)) for h in hidden]


@functools.partial(jax.jit, static_argnames="draft")
def _forward(params, embedding, tokens, features, anchors, valid, *, draft: DraftConfig):
    with jax.default_matmul_precision("highest"):
        model = bind(draft, params, jnp.float32)
        return model(
            block_input_embeddings(embedding.astype(jnp.float32), tokens, anchors, valid, draft),
            model.context(features),
            anchors=anchors,
            valid=valid,
            segment_start=jnp.zeros_like(tokens),
        )


def head_logits(
    hidden: Float[np.ndarray, "N B H"], frozen: Frozen, draft: DraftConfig
) -> Float[np.ndarray, "N slots V"]:
    """Logits of slots 1..B-1: the target's head, then the draft's scalars."""
    logits = np.asarray(_project(hidden[:, 1:], frozen.head))
    logits = logits * (draft.output_multiplier or 1.0)
    cap = draft.final_logit_softcapping
    return np.tanh(logits / cap) * cap if cap else logits


@jax.jit
def _project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("nbh,vh->nbv", hidden, head.astype(jnp.float32), precision="highest")


# --- the other systems ------------------------------------------------------------------------------------------------


def compare_systems(
    bridge: Bridge,
    directory: str | Path,
    params: Params,
    draft: DraftConfig,
    frozen: Callable[[], Frozen],
    conversations: Sequence[Conversation],
    systems: Sequence[str] = SYSTEMS["dflash"],
) -> list[Verdict]:
    """A verdict for the JAX draft itself, and one for each system that loads `directory`.

    Args:
      params: the draft's, rounded as the exported tensors are.
      draft: as it was trained, whatever the directory's config.json says.
      frozen: called again after the wait for the bridge, which may be another one by then.
    """
    dtype = str(frozen().embedding.dtype)
    ours = jax_blocks(params, draft, frozen(), conversations)
    verdicts = [
        Verdict(
            system="jax",
            status="same",
            note=f"jax {jax.__version__}, the reference",
            blocks=sum(len(c.anchors) for c in conversations),
            same_blocks=sum(len(c.anchors) for c in conversations),
            accept_len=_accept_len(ours, conversations),
        )
    ]
    digests = {name: digest(np.asarray(tensor)) for name, tensor in to_tensors(params, draft).items()}
    with tempfile.TemporaryDirectory(prefix="jaxdraft-check-") as scratch:
        inputs_path = Path(scratch) / "inputs.safetensors"
        save_file(
            {
                f"{i}.{name}": np.ascontiguousarray(getattr(conversation, name))
                for i, conversation in enumerate(conversations)
                for name in ("tokens", "features", "anchors")
            },
            inputs_path,
        )
        checked = bridge.check(str(Path(directory).resolve()), str(inputs_path), systems, dtype)
        for system in checked.systems:
            verdicts.append(_verdict(system, draft, digests, ours, frozen(), conversations))
    return verdicts


def _verdict(
    system: Any,
    draft: DraftConfig,
    digests: Mapping[str, str],
    ours: Sequence[Blocks],
    frozen: Frozen,
    conversations: Sequence[Conversation],
) -> Verdict:
    """Compares a `feature_bridge.contracts.CheckedSystem`: config fields, then tensors, then what it computed."""
    verdict = Verdict(system=system.name, status=system.status, note=system.note)
    difference = field_difference(system.fields, draft) or tensor_difference(system.weights, digests, system.fields)
    if system.status != "ran":
        return dataclasses.replace(verdict, difference=difference or (system.note if verdict.failed else ""))
    outputs = load_file(system.outputs_path)
    shape = ours[0].hidden.shape[1:]
    if outputs["0"].shape[1:] != shape:
        difference = difference or f"hidden states have shape {outputs['0'].shape[1:]}, not {shape}"
        return dataclasses.replace(verdict, status="differs", difference=difference)
    theirs = [Blocks(outputs[str(i)], head_logits(outputs[str(i)], frozen, draft)) for i in range(len(conversations))]
    same = ties = 0
    error = 0.0
    for mine, its, conversation in zip(ours, theirs, conversations, strict=True):
        for name in ("hidden", "logits"):
            a, b = getattr(mine, name), getattr(its, name)
            relative = float(np.abs(a - b).max() / np.abs(a).max())
            error = max(error, relative) if name == "logits" else error
            if not relative <= TOLERANCE:  # a NaN is a difference
                difference = difference or f"{name} of the blocks of {conversation.name} (error {relative:.1e})"
        moved = mine.proposed != its.proposed
        tie = mine.gap <= TOLERANCE * np.abs(mine.logits).max()
        same += int((~moved).all(-1).sum())
        ties += int((moved.any(-1) & (~moved | tie).all(-1)).sum())
        if (moved & ~tie).any():
            block = int(np.flatnonzero((moved & ~tie).any(-1))[0])
            anchor = int(conversation.anchors[block])
            difference = difference or f"the block proposed at token {anchor} of {conversation.name}"
        lens = mine.accept_lens(conversation), its.accept_lens(conversation)
        if (lens[0] != lens[1])[~(moved & tie).any(-1)].any():
            difference = difference or f"the accepted lengths of {conversation.name}"
    return dataclasses.replace(
        verdict,
        status="differs" if difference else "same",
        difference=difference,
        error=error,
        same_blocks=same,
        blocks=sum(len(c.anchors) for c in conversations),
        near_ties=ties,
        accept_len=_accept_len(theirs, conversations),
    )


def _accept_len(blocks: Sequence[Blocks], conversations: Sequence[Conversation]) -> float:
    return float(np.mean(np.concatenate([b.accept_lens(c) for b, c in zip(blocks, conversations, strict=True)])))


def field_difference(found: Mapping[str, Any], draft: DraftConfig) -> str:
    """The first config field that a system understood in another way than the draft was trained; empty: none."""
    for name, trained in config_fields(draft).items():
        if name in found and found[name] != trained:
            return f"{name} is {found[name]}, and the draft was trained with {trained}"
    return ""


def config_fields(draft: DraftConfig) -> dict[str, Any]:
    """The fields that every system must read alike, in the form in which the bridge reports them."""
    values = {name: getattr(draft, name) for name in FIELDS}
    return {
        name: DEFAULTS[name] if value is None else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def tensor_difference(found: Mapping[str, str], digests: Mapping[str, str], loaded: Any = True) -> str:
    """The first tensor that a system lacks, or holds with other values; empty: none."""
    if not loaded:  # it did not even load
        return ""
    for name, expected in digests.items():
        if name not in found:
            return f"tensor {name} was never loaded"
        if found[name] != expected:
            return f"tensor {name} has other values"
    return next((f"tensor {name} is not part of the draft" for name in found if name not in digests), "")


# --- conversations ----------------------------------------------------------------------------------------------------


def conversations_of(slot: Slot, names: Sequence[str], num_anchors: int) -> list[Conversation]:
    """The first samples of a slot's rows, one for each name, copied out of its memory."""
    batch = slot.batch
    tokens, starts, masks, features, ends = jax.device_get(
        (batch.tokens, batch.segment_start, batch.loss_mask, batch.features, batch.num_tokens)
    )
    found = []
    for row in range(len(tokens)):
        for start in np.unique(starts[row, : ends[row]]):
            span = np.flatnonzero(starts[row, : ends[row]] == start)
            span = slice(span[0], span[-1] + 1)
            places = np.flatnonzero(masks[row, span][:-1] & masks[row, span][1:])
            if not len(places) or len(found) == len(names):
                continue
            picked = places[np.unique(np.linspace(0, len(places) - 1, num_anchors).astype(int))]
            own = features[row, span].astype(np.float32)
            found.append(Conversation(names[len(found)], tokens[row, span].copy(), own, picked.astype(np.int32)))
    return found

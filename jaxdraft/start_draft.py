"""The draft that a run starts with: with random weights, of the shape that its config asks for, or one on disk."""

from __future__ import annotations

import dataclasses

import jax

from jaxdraft.config import DraftOptions
from jaxdraft.convert import load_draft, read_draft_config
from jaxdraft.export import check_target
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import from_tensors
from jaxdraft.target import TargetModel, make_draft_config, resolve_mask_token

INIT_FROM_DECIDES = (
    "num_layers", "block_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "target_layer_ids",
    "sliding_window",
)  # fmt: skip


def choose_shape(options: DraftOptions, target: TargetModel) -> DraftConfig:
    """The draft's shape: that of the draft in `draft.init_from`, but for an explicit mask token, or the config's.

    Raises:
      ValueError: an option is given that is not that draft's, or it is another target's.
    """
    if options.init_from is None:
        return make_draft_config(options, target)
    draft = read_draft_config(options.init_from)
    check_target(draft, target.config)
    there = {name: getattr(draft, name) for name in INIT_FROM_DECIDES}
    there["num_sliding_layers"] = draft.layer_types.count("sliding_attention")
    for name, value in there.items():
        if getattr(options, name) not in (None, 0, value):  # None, and 0 sliding layers: not given
            raise ValueError(
                f"draft.{name}={getattr(options, name)} is not that of draft.init_from={options.init_from}; "
                f"set it to {value}"
            )
    if options.mask_token_id is None:
        return draft
    return dataclasses.replace(draft, mask_token_id=resolve_mask_token(options.mask_token_id, target))


def start_weights(options: DraftOptions, draft: DraftConfig) -> dict[str, jax.Array] | None:
    """The weights in `draft.init_from`, None: random ones. Raises ValueError: they are not those of a `draft`."""
    if options.init_from is None:
        return None
    tensors, _ = load_draft(options.init_from)
    return from_tensors(tensors, draft)

"""`speculators`, vLLM's form of a draft: the same tensors, and a config.json whose numbers mean other things.

- Its layer ids count hidden states, of which the embedding's output is number 0: ours + 1.
- Its sliding window begins a window before the anchor, for all slots of a block; ours begins before each slot. So a
  draft with windows is refused in both directions: it would load, and accept less.
- It has no scalars on embeddings or logits, and its full layers always see the whole block.

Source: `speculators.models.dflash` and its converter, 0.9.0, which the tests load our files with. vLLM was not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feature_bridge.draft_files import SLIDING, read_layers
from feature_bridge.model_files import read_json, text_config
from jaxdraft.model.dflash import DraftConfig

VERSION = "0.9.0"
# Parts of a DFlash config.json that say nothing about the decoder's layers.
NOT_OF_THE_LAYERS = ("architectures", "auto_map", "block_size", "dflash_config", "num_target_layers")
# What earlier versions saved beside the draft's own tensors: copies of the target's.
OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")


def to_speculators(
    draft: DraftConfig, config: Mapping[str, Any], target: Mapping[str, Any], target_name: str | None
) -> dict[str, Any]:
    """The config.json of a draft in this form.

    Args:
      config: its DFlash config.json (`export.hf_config`).
      target: the target's config.json.
      target_name: directory or hub id of the target, which vLLM loads beside the draft.

    Raises:
      ValueError: the draft has something that this form cannot say; names it.
    """
    neutral = {
        "layer_types": ("full_attention",) * draft.num_layers,
        "is_causal": False,
        "input_embedding_scale": 1.0,
        "output_multiplier": 1.0,
        "final_logit_softcapping": 0.0,
    }
    for name, value in neutral.items():
        if (found := getattr(draft, name)) not in (None, value):
            raise ValueError(
                f"the draft's {name}={found} cannot be expressed in speculators' format; export it with --format dflash"
            )
    if draft.target_layer_ids[-1] + 1 == draft.num_target_layers:
        raise ValueError(
            f"the draft reads the target's last layer, {draft.target_layer_ids[-1]}, which speculators' format cannot "
            "express; export it with --format dflash"
        )
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": draft.block_size - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": target.get("architectures") or []},
        },
        "aux_hidden_state_layer_ids": [l + 1 for l in draft.target_layer_ids],
        "block_size": draft.block_size,
        "draft_vocab_size": draft.vocab_size,
        "dtype": config["dtype"],
        "mask_token_id": draft.mask_token_id,
        "num_target_layers": draft.num_target_layers,  # ours alone; its config keeps what it does not know
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {n: value for n, value in config.items() if n not in NOT_OF_THE_LAYERS},
    }


def is_speculators(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


def from_speculators(config: Mapping[str, Any]) -> dict[str, Any]:
    """The DFlash config.json of a draft in this form.

    Raises:
      ValueError: a draft of another kind, or one that means something that ours does not.
      KeyError: a field is missing.
    """
    layers = dict(config["transformer_layer_config"])
    unsupported = {
        "speculators_model_type": (config["speculators_model_type"], "dflash"),
        "sample_from_anchor": (config.get("sample_from_anchor", False), False),
        "draft_vocab_size": (config["draft_vocab_size"], layers["vocab_size"]),
        "target_hidden_size": (config.get("target_hidden_size") or layers["hidden_size"], layers["hidden_size"]),
        "layer_types": (SLIDING in (layers.get("layer_types") or read_layers(layers)[0]), False),
    }
    for name, (found, computed) in unsupported.items():
        if found != computed:
            found = SLIDING if name == "layer_types" else found
            raise ValueError(f"{name}={found!r} of a speculators draft is not supported; start from another draft")
    ids = config["aux_hidden_state_layer_ids"]
    if min(ids) < 1:
        raise ValueError(f"aux_hidden_state_layer_ids={ids} reads the embedding; start from another draft")
    return {
        **layers,
        "architectures": ["DFlashDraftModel"],
        "block_size": config["block_size"],
        "dflash_config": {"mask_token_id": config["mask_token_id"], "target_layer_ids": [i - 1 for i in ids]},
        "num_target_layers": config.get("num_target_layers") or _target_layers(config),
    }


def _target_layers(config: Mapping[str, Any]) -> int:
    """The target's depth, which this form leaves out: read from the target's own config.json."""
    name = config["speculators_config"]["verifier"]["name_or_path"]
    file = Path(str(name)) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"num_target_layers is missing, and its target {name!r} is not a directory here; add it to config.json"
        )
    return text_config(read_json(file))["num_hidden_layers"]

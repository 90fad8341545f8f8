"""What the trainer reads of the target by itself: config.json, the tokenizer's ids, the frozen embedding and LM head.

No transformers and no torch: these are JSON and safetensors files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from feature_bridge.model_files import (
    INDEX,
    config_field,
    find_model,
    open_tensors,
    read_config,
    read_json,
    rope_theta,
    tensor_files,
    text_config,
)
from jaxdraft.config import DraftOptions, TargetConfig
from jaxdraft.model.dflash import DraftConfig, default_target_layer_ids

EMBED_KEYS = (  # VLM, LLM, older VLM layouts
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)
HEAD_KEYS = ("lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight")
DEFAULT_ROPE_THETA = {  # of transformers' classes, by model_type, where config.json gives none
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe"), 1e4),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), 1e6),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), 5e5),
}
QUANTISED_SUFFIXES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scales", "qzeros")


@dataclass(frozen=True)
class TargetModel:
    """A target on disk. For a VLM the text model's fields are those of `text_config`."""

    directory: Path
    config: dict[str, Any]

    @property
    def text(self) -> Mapping[str, Any]:
        return text_config(self.config)

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the top level, or of `text_config` where it is missing there."""
        return config_field(self.config, name, default)

    def size(self, name: str) -> int:
        """A size of the text model. Raises ValueError: its config.json does not say."""
        if not isinstance(value := self.text.get(name), int):
            raise ValueError(
                f"target.path={str(self.directory)!r} has {name}={value!r} in its config.json and not a number; "
                "give a target of a family in docs/families.md"
            )
        return value

    @property
    def num_layers(self) -> int:
        return self.size("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        return self.size("hidden_size")

    @property
    def vocab_size(self) -> int:
        return self.size("vocab_size")

    @property
    def head_dim(self) -> int:
        return self.text.get("head_dim") or self.hidden_size // self.size("num_attention_heads")

    @property
    def rope_theta(self) -> float:
        """The base of its rotary positions. Raises ValueError: config.json does not say, or gives several."""
        if (base := rope_theta(self.text)) is not None:
            return base
        family = str(self.text.get("model_type") or "llama").removesuffix("_text")  # the base class's is Llama's
        if family not in DEFAULT_ROPE_THETA:
            raise ValueError(
                f"target.path={str(self.directory)!r} has no rope_theta in its config.json; write the model's there"
            )
        return DEFAULT_ROPE_THETA[family]

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """File of each tensor."""
        index = self.directory / INDEX
        if index.is_file():
            names = read_json(index)["weight_map"]
            return {name: self.directory / file for name, file in names.items()}
        found = {}
        for file in tensor_files(self.directory):
            with open_tensors(file, "flax") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        if not found:
            raise ValueError(f"target.path={self.directory} has no .safetensors file; give a complete model directory")
        return found

    def load(self, key: str) -> Array:
        with open_tensors(self.tensors[key], "flax") as tensors:
            return tensors.get_tensor(key)

    def describe(self, key: str) -> tuple[str, list[int]]:
        """safetensors' name of a tensor's dtype, and its shape."""
        with open_tensors(self.tensors[key], "flax") as tensors:
            part = tensors.get_slice(key)
            return part.get_dtype(), part.get_shape()

    def rows(self, key: str, rows: Iterable[int]) -> Float[Array, "rows H"]:
        """Some rows of a matrix; the others are not read."""
        with open_tensors(self.tensors[key], "flax") as tensors:
            matrix = tensors.get_slice(key)
            return jnp.concatenate([matrix[int(i) : int(i) + 1] for i in rows])


def open_target(config: TargetConfig, *, weights: bool = True) -> TargetModel:
    """The target's directory, downloaded first where `path` is a hub id; without `weights` its JSON files alone.

    Raises:
      ValueError: no such directory, a hub id without a revision, or no config.json.
    """
    directory = find_model(config.path, config.revision, weights=weights)
    return TargetModel(directory, read_config(directory))


def make_draft_config(options: DraftOptions, target: TargetModel) -> DraftConfig:
    """The full shape of a new draft: the options, and the target's own numbers where they leave it open.

    Raises:
      ValueError: a combination that cannot be (see `DraftConfig`).
    """

    def either(name: str, of_the_target: str) -> int:
        own = getattr(options, name)
        return target.size(of_the_target) if own is None else own

    num_heads = either("num_heads", "num_attention_heads")
    kv_heads = options.num_kv_heads
    if kv_heads is None:
        kv_heads = target.text.get("num_key_value_heads") or num_heads
    return DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=either("intermediate_size", "intermediate_size"),
        num_layers=options.num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=target.head_dim if options.head_dim is None else options.head_dim,
        vocab_size=target.vocab_size,
        block_size=options.block_size,
        target_layer_ids=default_target_layer_ids(target.num_layers, options.num_layers)
        if options.target_layer_ids is None
        else options.target_layer_ids,
        num_target_layers=target.num_layers,
        mask_token_id=resolve_mask_token(options.mask_token_id, target),
        rms_norm_eps=target.text.get("rms_norm_eps", 1e-6),
        rope_theta=target.rope_theta,
        layer_types=tuple(
            "sliding_attention" if i < options.num_sliding_layers else "full_attention"
            for i in range(options.num_layers)
        ),
        sliding_window=options.sliding_window,
        initializer_range=options.initializer_range,
        max_position_embeddings=target.text.get("max_position_embeddings", 32768),
    )


def resolve_mask_token(explicit: int | None, target: TargetModel) -> int:
    """MASK's id: explicit, else the tokenizer's mask token, else an unused id below the vocabulary's size.

    Raises:
      ValueError: the explicit id is not below vocab_size, every id is in use, or there is no tokenizer.
    """
    vocab_size = target.vocab_size
    if explicit is not None:
        if not 0 <= explicit < vocab_size:
            raise ValueError(
                f"draft.mask_token_id={explicit} is not below the target's vocab_size={vocab_size}; "
                "serving engines reject it: give an unused id below it"
            )
        return explicit
    used, mask_token = _tokenizer_ids(target.directory)
    if mask_token is not None and mask_token < vocab_size:
        return mask_token
    for candidate in (len(used), *range(vocab_size - 1, -1, -1)):
        if candidate < vocab_size and candidate not in used:
            return candidate
    raise ValueError(
        f"every id of {target.directory}'s vocabulary ({vocab_size}) is in use; set draft.mask_token_id to a rare one"
    )


def _tokenizer_ids(directory: Path) -> tuple[set[int], int | None]:
    """Ids in use, and the mask token's id if the tokenizer has one."""
    ids: dict[str, int] = {}
    if (file := directory / "tokenizer.json").is_file():
        tokenizer = read_json(file)
        vocab = tokenizer["model"]["vocab"]
        ids |= vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    elif (file := directory / "vocab.json").is_file():
        ids |= read_json(file)
    if (file := directory / "added_tokens.json").is_file():
        ids |= read_json(file)
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file := directory / name).is_file():
            settings |= {key: value for key, value in read_json(file).items() if value is not None}
    ids |= {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if not ids:
        raise ValueError(f"{directory} has no tokenizer files; set draft.mask_token_id, or complete the directory")
    mask = settings.get("mask_token")
    return set(ids.values()), ids.get(mask["content"] if isinstance(mask, dict) else mask)


def load_frozen(
    config: TargetConfig, target: TargetModel, dtype: Any
) -> tuple[Float[Array, "V H"], Float[Array, "V H"]]:
    """The target's embedding and LM head, both [vocab_size, hidden_size]; one array where they are tied.

    Raises:
      ValueError: a key that does not exist (lists candidates), a quantised tensor, or a wrong shape.
    """
    embed_key, head_key = frozen_keys(config, target)
    embedding = jax.device_put(target.load(embed_key).astype(dtype))
    head = embedding if head_key == embed_key else jax.device_put(target.load(head_key).astype(dtype))
    return embedding, head


def frozen_keys(config: TargetConfig, target: TargetModel) -> tuple[str, str]:
    """Names of the embedding's and the LM head's tensors, the same where they are tied. Raises as `load_frozen`."""
    embed_key = _find_key("embed_key", config.embed_key, EMBED_KEYS, target, "embed_tokens")
    _check_matrix("embed_key", embed_key, target)
    if target.field("tie_word_embeddings", False) and config.lm_head_key is None:
        return embed_key, embed_key  # a tied checkpoint may carry a stale copy of the head; the model ignores it
    head_key = _find_key("lm_head_key", config.lm_head_key, HEAD_KEYS, target, "lm_head")
    _check_matrix("lm_head_key", head_key, target)
    return embed_key, head_key


def _find_key(field: str, explicit: str | None, known: tuple[str, ...], target: TargetModel, hint: str) -> str:
    candidates = [name for name in target.tensors if hint in name]
    if explicit is not None:
        if explicit in target.tensors:
            return explicit
        raise ValueError(
            f"target.{field}={explicit} is not among the target's tensors; "
            f"candidates: {', '.join(candidates) or 'none'}"
        )
    for key in known:
        if key in target.tensors:
            return key
    quantised = [name for name in candidates if name.endswith(QUANTISED_SUFFIXES)]
    if quantised:
        raise ValueError(
            f"target.{field}: {quantised[0]} is quantised, and the draft's loss needs it in full precision; "
            "use a target whose embedding and LM head are left out of the quantisation"
        )
    raise ValueError(
        f"target.{field} was not found; set it to one of: {', '.join(candidates or list(target.tensors)[:8])}"
    )


def _check_matrix(field: str, key: str, target: TargetModel) -> None:
    stem = key.removesuffix("weight")
    quantised = [stem + suffix for suffix in QUANTISED_SUFFIXES if stem + suffix in target.tensors]
    dtype, shape = target.describe(key)
    if quantised or dtype not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"target.{field}: {key} is quantised ({dtype}), and the draft's loss needs it in full precision; "
            "use a target whose embedding and LM head are left out of the quantisation"
        )
    if shape != [target.vocab_size, target.hidden_size]:
        raise ValueError(
            f"target.{field}: {key} has shape {shape}, but the target's config says "
            f"[{target.vocab_size}, {target.hidden_size}]; name another tensor"
        )

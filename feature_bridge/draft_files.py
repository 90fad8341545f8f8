"""A DFlash draft's config.json, as both sides read it: one function, from fields to numbers. Standard library only.

What z-lab's class makes of a file (that is, of transformers' Qwen3Config) is the meaning of the file. Where another
system that loads it would make something else of it, the file is refused by name: docs/draft_config.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
# Parts of other draft families that this model lacks; a config that switches one on is refused by its name.
FOREIGN_FIELDS = (
    "projector_type",
    "pure_draft_prefix_len",
    "shift_label",
    "selector_rank",
    "conv_kernel_size",
    "attention_sink_bias",
    "add_swa_attention_sink_bias",
    "attention_value_scale",
    "sample_from_anchor",
    "use_swa",
)
# z-lab's class looks into dflash_config first and then at the top, and not every system does the same.
IN_TWO_PLACES = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
)


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """All that a draft's config.json says of its forward pass."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    rms_norm_eps: float
    rope_theta: float
    layer_types: tuple[str, ...]
    sliding_window: int | None  # of the sliding layers; None where there are none
    is_causal: bool | None  # overrides every layer
    input_embedding_scale: float | None  # None: not given, which means 1
    output_multiplier: float | None  # None: not given, which means 1
    final_logit_softcapping: float | None  # None: no cap
    max_position_embeddings: int

    @property
    def windows(self) -> tuple[int | None, ...]:
        """By layer: its window in tokens; None: full attention."""
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types)

    @property
    def causal(self) -> tuple[bool, ...]:
        """By layer: slot k sees slots <= k only. Without an override these are the sliding layers."""
        return tuple(kind == SLIDING if self.is_causal is None else self.is_causal for kind in self.layer_types)


def read_shape(config: Mapping[str, Any]) -> DraftShape:
    """The shape of a draft from its config.json: z-lab's old and new forms.

    Raises:
      ValueError: a field is missing, of the wrong type, not computed by this model, or read in different ways by the
        systems that load drafts; names the field.
    """
    try:
        return _read(config)
    except KeyError as error:
        raise ValueError(f"the draft's config has no field {error}; give a DFlash draft's config") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"the draft's config has a field of the wrong type ({error}); give a DFlash draft's config"
        ) from error


def _read(config: Mapping[str, Any]) -> DraftShape:
    if "speculators_model_type" in config:
        raise ValueError("the draft is of speculators' form; write it as another with python -m jaxdraft.convert")
    layer_types, sliding_window = read_layers(config)
    rope_theta = _read_rope(config)
    _refuse_others(config)
    found = {name: _of_two_places(config, name) for name in IN_TWO_PLACES}
    for name in ("mask_token_id", "target_layer_ids"):
        if found[name] is None:
            raise ValueError(f"the draft's {name} is missing; write what it was trained with into dflash_config")
    if config.get("num_target_layers") is None:
        raise KeyError("num_target_layers")  # z-lab's class does not look for it in dflash_config
    cap = found["final_logit_softcapping"]
    return DraftShape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=_given(config, "num_key_value_heads", config["num_attention_heads"]),
        head_dim=int(config.get("head_dim", 128)),  # not by the heads: Qwen3Config has a default of its own
        vocab_size=config["vocab_size"],
        block_size=16 if found["block_size"] is None else int(found["block_size"]),
        mask_token_id=int(found["mask_token_id"]),
        target_layer_ids=tuple(found["target_layer_ids"]),
        num_target_layers=config["num_target_layers"],
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        layer_types=layer_types,
        sliding_window=sliding_window,
        is_causal=_read_causality(config, layer_types),
        input_embedding_scale=_number(found["input_embedding_scale"]),
        output_multiplier=_number(found["output_multiplier"]),
        final_logit_softcapping=float(cap) if cap is not None and float(cap) > 0 else None,  # 0 means none
        max_position_embeddings=config.get("max_position_embeddings", 32768),
    )


def read_layers(config: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer, and the window of those that slide, as Qwen3Config fills in what is not given.

    Raises ValueError: kinds that no system has, or sliding layers without a window.
    """
    num_layers = config["num_hidden_layers"]
    used = bool(config.get("use_sliding_window", False))
    window = config.get("sliding_window", 4096) if used else None  # without the switch there is none
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = [SLIDING if window is not None and i >= first else FULL for i in range(num_layers)]
    kinds = tuple(kinds)
    if len(kinds) != num_layers:
        raise ValueError(
            f"the draft's layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}; give one a layer"
        )
    if unknown := sorted(set(kinds) - set(LAYER_TYPES)):
        raise ValueError(f"the draft's layer_types has {unknown}; only {' and '.join(LAYER_TYPES)} are supported")
    if SLIDING not in kinds:
        return kinds, None
    # z-lab's class would compute them without any window, SGLang and SpecForge refuse them.
    if not used:
        raise ValueError(
            "the draft has layer_types with sliding_attention and not use_sliding_window, so no system gives them a "
            "window; set use_sliding_window to true"
        )
    if window is None or window < 1:
        raise ValueError(
            f"the draft has layer_types with sliding_attention and sliding_window={window!r}; write it in tokens"
        )
    return kinds, window


def rope_fields(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The field that transformers reads rotary positions from, and its content.

    The older field wins over the newer one, and all of it: a base in rope_parameters is not looked at then.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, config.get(name) or {}


def _read_rope(config: Mapping[str, Any]) -> float:
    """The base of plain rotary positions, from wherever transformers takes it."""
    name, rope = rope_fields(config)
    if nested := sorted(key for key, value in rope.items() if isinstance(value, Mapping)):
        raise ValueError(
            f"the draft's {name} is nested by layer type ({', '.join(nested)}), and z-lab's class reads no base from "
            "there; write one flat rope_parameters"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(
            f"the draft's {name} has rope_type={rope_type!r}, which is not supported; a DFlash draft has plain rope"
        )
    # vLLM refuses the first, SGLang rotates less of a head with the second, z-lab's class reads neither.
    if rope.get("mrope_section") is not None:
        raise ValueError(f"the draft's {name} has mrope_section, which is not supported; a DFlash draft has 1-D rope")
    for fields in (config, rope):
        if (part := fields.get("partial_rotary_factor")) not in (None, 1):
            raise ValueError(f"the draft's partial_rotary_factor={part!r} is not supported, only 1; use another draft")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not isinstance(theta, int | float) or isinstance(theta, bool):
        raise ValueError(f"the draft's rope_theta={theta!r} is not a number; write the target's into rope_parameters")
    return float(theta)


def _refuse_others(config: Mapping[str, Any]) -> None:
    """What this model does not compute, and what some systems would compute and others not."""
    architectures = config.get("architectures") or ["DFlashDraftModel"]
    if architectures != ["DFlashDraftModel"]:
        raise ValueError(f"the draft's architectures={architectures} is not ['DFlashDraftModel']; use a DFlash draft")
    neutral = {"hidden_act": "silu", "attention_bias": False, "is_neox_style": True, "rope_is_neox_style": True}
    for name, value in neutral.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"the draft's {name}={found!r} is not supported, only {value!r}; use another draft")
    for name in FOREIGN_FIELDS:
        for found in _places(config, name):
            if found:
                raise ValueError(f"the draft's {name}={found!r} is not supported; use a plain DFlash draft")
    if config.get("text_config") is not None:
        raise ValueError("the draft's text_config is read by SGLang alone; write its fields at the top")


def _read_causality(config: Mapping[str, Any], layer_types: tuple[str, ...]) -> bool | None:
    """is_causal at the top: no system reads it in dflash_config, where vLLM alone reads `causal`."""
    value = config.get("is_causal")
    is_causal = None if value is None else bool(value)
    nested = config.get("dflash_config") or {}
    for name in ("is_causal", "causal"):
        if (other := nested.get(name)) is None:
            continue
        if any((kind == SLIDING if is_causal is None else is_causal) != bool(other) for kind in layer_types):
            raise ValueError(
                f"the draft's dflash_config.{name}={other!r} is not read by z-lab's class or SGLang, and is_causal at "
                f"the top level is {value!r}; write it there alone"
            )
    return is_causal


def _of_two_places(config: Mapping[str, Any], name: str) -> Any:
    """A field of dflash_config, else of the top; None: in neither."""
    found = list(_places(config, name))
    if not found:
        return None
    if any(value != found[0] for value in found):
        raise ValueError(
            f"the draft's {name} is {found[0]!r} in dflash_config and {found[1]!r} at the top level; write one of them"
        )
    if found[0] is None and name in ("block_size", "input_embedding_scale", "output_multiplier"):
        raise ValueError(f"the draft's {name} is null, where z-lab's class wants a value; write it or leave it out")
    return found[0]


def _places(config: Mapping[str, Any], name: str) -> Iterator[Any]:
    for fields in (config.get("dflash_config") or {}, config):
        if name in fields:
            yield fields[name]


def _given(config: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = config[name]
    return otherwise if value is None else value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

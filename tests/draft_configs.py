"""Ways to write a draft's config.json, and whether they are read or refused: one table for all that read it."""

DRAFT = {"mask_token_id": 96, "target_layer_ids": [1, 2, 4]}
CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": 6,
    "dflash_config": DRAFT,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 40,
    "intermediate_size": 72,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_target_layers": 7,
    "rms_norm_eps": 1e-6,
    "vocab_size": 97,
}
FLAT = {"rope_type": "default", "rope_theta": 5e6}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SWITCHED = {"layer_types": MIXED, "use_sliding_window": True}
WINDOWS = {**SWITCHED, "sliding_window": 9}


def without(name):
    return {name: ...}


def nested(**fields):
    return {"dflash_config": {**DRAFT, **fields}}


READ = {
    # the base of the rotary positions
    "no base": {},
    "base at the top": {"rope_theta": 3e6},
    "rope_parameters": {"rope_parameters": FLAT},
    "stale base at the top": {"rope_theta": 3e6, "rope_parameters": FLAT},
    "rope_parameters without a base": {"rope_theta": 3e6, "rope_parameters": {"rope_type": "default"}},
    "rope_scaling beside rope_parameters": {
        "rope_parameters": FLAT, "rope_scaling": {"rope_type": "default", "rope_theta": 2e5},
    },
    "rope_scaling without a base": {"rope_parameters": FLAT, "rope_scaling": {"rope_type": "default"}},
    "rope_scaling and a base at the top": {
        "rope_theta": 3e6, "rope_parameters": FLAT, "rope_scaling": {"type": "default"},
    },
    "empty rope_scaling": {"rope_theta": 3e6, "rope_parameters": FLAT, "rope_scaling": {}},
    "null rope_scaling": {"rope_theta": 3e6, "rope_parameters": FLAT, "rope_scaling": None},
    "two types": {"rope_parameters": {**FLAT, "type": "linear"}},
    # windows
    "windows": WINDOWS,
    "windows without a number": SWITCHED,
    "switch without layer_types": {"use_sliding_window": True, "sliding_window": 9},
    "switch and max_window_layers 0": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "switch and max_window_layers 1": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "switch and null window": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "window without the switch": {"sliding_window": 9, "max_window_layers": 0},
    # causality
    "causal": {"is_causal": True},
    "two-sided windows": {**WINDOWS, "is_causal": False},
    "null causality": {**WINDOWS, "is_causal": None},
    "causality twice": {"is_causal": True, **nested(is_causal=True)},
    "causality inside that changes nothing": nested(is_causal=False),
    # what is inside dflash_config or at the top
    "block size inside": {**without("block_size"), **nested(block_size=5)},
    "block size twice": nested(block_size=6),
    "no block size": without("block_size"),
    "mask token at the top": {"mask_token_id": 95, "dflash_config": {"target_layer_ids": [1, 2, 4]}},
    "layers at the top": {"target_layer_ids": [0, 3, 5], "dflash_config": {"mask_token_id": 96}},
    "all at the top": {**DRAFT, **without("dflash_config")},
    "scalars inside": nested(input_embedding_scale=3.0, output_multiplier=0.5, final_logit_softcapping=2.0),
    "scalars at the top": {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0},
    "scalars twice": {"output_multiplier": 0.5, **nested(output_multiplier=0.5)},
    "no cap": {"final_logit_softcapping": 0.0, **nested(output_multiplier=0.5)},
    "negative cap": nested(final_logit_softcapping=-1.0),
    "null cap": nested(final_logit_softcapping=None),
    # sizes
    "heads of 128": without("head_dim"),
    "null key and value heads": {"num_key_value_heads": None},
}  # fmt: skip
REFUSED = {
    # changes, the name in the message
    "null base": ({"rope_theta": None}, "rope_theta=None"),
    "null base inside": ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta=None"),
    "by layer type": ({"rope_parameters": {"full_attention": FLAT}}, "rope_parameters is nested by layer type"),
    "by layer type, base at the top": (
        {"rope_theta": 3e6, "rope_parameters": {"full_attention": FLAT}}, "rope_parameters is nested",
    ),
    "by both layer types": (
        {**WINDOWS, "rope_parameters": {"full_attention": FLAT, "sliding_attention": {**FLAT, "rope_theta": 1e4}}},
        "rope_parameters is nested",
    ),
    "linear": ({"rope_parameters": {**FLAT, "rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "older linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "linear beside": (
        {"rope_parameters": FLAT, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'",
    ),
    "dynamic": ({"rope_parameters": {**FLAT, "rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
    "m-rope": ({"rope_parameters": {**FLAT, "mrope_section": [3, 3, 2]}}, "mrope_section"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "part of a head, inside": ({"rope_parameters": {**FLAT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "interleaved rope": ({"is_neox_style": False}, "is_neox_style"),
    "windows without the switch": ({"layer_types": MIXED, "sliding_window": 9}, "use_sliding_window"),
    "null window": ({**SWITCHED, "sliding_window": None}, "sliding_window=None"),
    "window of 0": ({**SWITCHED, "sliding_window": 0}, "sliding_window=0"),
    "too few layer_types": ({"layer_types": MIXED[:2]}, "layer_types has 2 entries"),
    "no layer_types": ({"layer_types": []}, "layer_types has 0 entries"),
    "another layer type": ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "causality inside": (nested(is_causal=True), "is_causal=True"),
    "causality inside, of windows": ({**WINDOWS, **nested(is_causal=False)}, "is_causal=False"),
    "two causalities": ({"is_causal": True, **nested(is_causal=False)}, "is_causal=False"),
    "vLLM's causality": (nested(causal=True), "causal=True"),
    "two block sizes": (nested(block_size=5), "block_size is 5 in dflash_config and 6"),
    "null block size": ({**without("block_size"), **nested(block_size=None)}, "block_size is null"),
    "two mask tokens": ({"mask_token_id": 95}, "mask_token_id"),
    "no mask token": ({"dflash_config": {"target_layer_ids": [1, 2, 4]}}, "mask_token_id is missing"),
    "null mask token": ({**nested(mask_token_id=None), "mask_token_id": 96}, "mask_token_id"),
    "other layers at the top": ({"target_layer_ids": [0, 3, 5]}, "target_layer_ids"),
    "no layers": ({"dflash_config": {"mask_token_id": 96}}, "target_layer_ids is missing"),
    "depth inside": ({**without("num_target_layers"), **nested(num_target_layers=7)}, "num_target_layers"),
    "two depths": (nested(num_target_layers=8), "num_target_layers"),
    "two factors": ({"output_multiplier": 2.0, **nested(output_multiplier=0.5)}, "output_multiplier"),
    "null factor": (nested(output_multiplier=None), "output_multiplier is null"),
    "two caps": ({"final_logit_softcapping": 2.0, **nested(final_logit_softcapping=None)}, "final_logit_softcapping"),
    "Domino": (nested(projector_type="domino"), "projector_type"),
    "predicts from its anchor": ({"sample_from_anchor": True}, "sample_from_anchor"),
    "vLLM's windows": (nested(use_swa=True), "use_swa"),
    "scaled values": (nested(attention_value_scale=2.0), "attention_value_scale"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "biases": ({"attention_bias": True}, "attention_bias"),
}  # fmt: skip


def full(changes):
    """A whole config.json; a field that is ... is left out."""
    return {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}

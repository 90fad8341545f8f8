"""Reading drafts: old and new forms, and what is refused."""

import dataclasses
import json

import pytest
from export_helpers import CONFIG, K_NORM, TARGET, random_tensors
from safetensors.numpy import save_file

from jaxdraft.convert import Arguments, convert, load_draft, parse_draft_config
from jaxdraft.export import export_draft, hf_config


def test_reads_old_and_new_config_forms():
    old = {k: v for k, v in hf_config(CONFIG, TARGET, "bfloat16").items() if k != "rope_parameters"}
    new = {k: v for k, v in hf_config(CONFIG, TARGET, "bfloat16").items() if k not in ("block_size", "rope_theta")}
    new["dflash_config"] = {**new["dflash_config"], "block_size": 6, "output_multiplier": 0.5}
    new["is_causal"] = True  # no system reads it in dflash_config
    assert parse_draft_config(old) == CONFIG
    assert parse_draft_config(new) == dataclasses.replace(CONFIG, output_multiplier=0.5, is_causal=True)
    new["final_logit_softcapping"] = 0.0  # z-lab: not positive means none
    assert parse_draft_config(new).final_logit_softcapping is None
    scalars = {"input_embedding_scale": 3.0, "output_multiplier": 0.25, "final_logit_softcapping": 30.0}
    for scaled in ({**old, **scalars}, {**old, "dflash_config": {**old["dflash_config"], **scalars}}):
        assert parse_draft_config(scaled) == dataclasses.replace(CONFIG, **scalars)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "rope_type"),
        ({"rope_parameters": {"rope_theta": 5e6, "mrope_section": [3, 3, 2]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 9}, "use_sliding_window"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 4]}}, "mask_token_id"),
        ({"dflash_config": {"target_layer_ids": [2, 1, 4], "mask_token_id": 96}}, "target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 7], "mask_token_id": 96}}, "target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 4], "mask_token_id": 97}}, "mask_token_id"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None is not a number"),
        ({"rms_norm_eps": None}, "has a field of the wrong type"),
        ({"target_layer_ids": 3, "dflash_config": {"mask_token_id": 96}}, "has a field of the wrong type"),
        (
            {"dflash_config": {"target_layer_ids": [1], "mask_token_id": 9, "projector_type": "domino"}},
            "projector_type",
        ),
    ],
)
def test_load_names_what_it_does_not_compute(tmp_path, change, named):
    export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named):
        load_draft(tmp_path / "draft")


def test_load_refuses_a_missing_tensor_and_an_empty_directory(tmp_path):
    export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "draft")
    tensors, _ = load_draft(tmp_path / "draft")
    del tensors[K_NORM]
    save_file(tensors, tmp_path / "draft" / "model.safetensors")
    with pytest.raises(ValueError, match=K_NORM):
        load_draft(tmp_path / "draft")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_draft(tmp_path / "nowhere")


@pytest.mark.parametrize("output", ["above/draft", "above"])
def test_a_draft_does_not_end_with_its_conversion(tmp_path, output):
    """`above` is an earlier export, which the command would replace with all that is in it."""
    export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "above")
    export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "above" / "draft")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET))
    paths = {"draft": str(tmp_path / "above" / "draft"), "target": str(tmp_path / "target")}
    with pytest.raises(ValueError, match="holds --draft and would replace it"):
        convert(Arguments(**paths, output=str(tmp_path / output)))
    load_draft(tmp_path / "above" / "draft")

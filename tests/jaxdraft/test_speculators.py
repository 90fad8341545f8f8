"""vLLM's form of a draft: what the `speculators` package makes of ours, what we make of its, and what is refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_export import CONFIG, SLIDING, TARGET, random_tensors

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.convert import load_draft
from jaxdraft.export import export_draft
from jaxdraft.model.dflash import bind, block_input_embeddings
from jaxdraft.model.tensors import from_tensors

torchvision_ops.ensure()  # it imports transformers' image code


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A text target that both forms can be of."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("target")
    config = Qwen3Config(
        hidden_size=40, vocab_size=97, num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1, head_dim=20,
        intermediate_size=48, rope_parameters={"rope_type": "default", "rope_theta": 5e6}, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def export(directory, target, config=CONFIG, form="speculators", **options):
    about = json.loads((target / "config.json").read_text())
    return export_draft(
        random_tensors(config), config, about, directory, form=form, provenance={"target": str(target)}, **options
    )


def test_the_packages_own_converter_writes_the_same(tmp_path, target):
    from speculators.convert.dflash.converter import DFlashConverter

    DFlashConverter().convert(export(tmp_path / "dflash", target, form="dflash"), tmp_path / "theirs", str(target))
    ours = export(tmp_path / "ours", target)
    assert sorted(p.name for p in ours.iterdir()) == ["README.md", "config.json", "export.json", "model.safetensors"]
    found, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert found.pop("num_target_layers") == 7
    del expected["auto_map"], expected["transformers_version"]
    layers = [config.pop("transformer_layer_config") for config in (found, expected)]
    assert found == expected
    assert layers[0] == layers[0] | layers[1]
    from safetensors.torch import load_file as load_torch

    tensors = [load_torch(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_its_model_computes_what_ours_does(tmp_path, target, monkeypatch):
    """Its whole forward pass, with its own masks, on several blocks of a sample."""
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core

    directory = export(tmp_path / "draft", target, dtype="float32")
    config = DFlashSpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    model = DFlashDraftModel.from_pretrained(directory, config=config, dtype=torch.float32)
    assert not any(weight.isnan().any() for weight in model.state_dict().values())  # what was never loaded
    assert (model.target_layer_ids, model.mask_token_id, model.block_size) == ([2, 3, 5], 96, 6)
    weights = load_file(target / "model.safetensors")  # from which it has loaded embedding and head by itself
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), weights["lm_head.weight"])

    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 96, (1, 31)).astype(np.int32)
    features = rng.normal(size=(1, 31, CONFIG.feature_size)).astype(np.float32)
    anchors = np.array([[1, 8, 9, 24]], np.int32)
    chosen = torch.from_numpy(anchors[0]).long(), torch.ones(4, dtype=torch.bool)
    monkeypatch.setattr(core, "select_anchors", lambda *_: chosen)
    with torch.inference_mode():
        hidden, logits, *_ = model.eval()._backbone_forward(
            torch.from_numpy(features),
            torch.from_numpy(tokens).long(),
            torch.ones(1, 31),
            torch.zeros(1, 31, 40),
            torch.zeros(1, 31, dtype=torch.long),
            max_anchors=4,
        )
    with jax.default_matmul_precision("highest"):
        ours = bind(CONFIG, from_tensors(random_tensors(), CONFIG), jnp.float32)
        valid = np.ones_like(anchors, bool)
        embedding = jnp.asarray(weights["model.embed_tokens.weight"])
        blocks = block_input_embeddings(embedding, tokens, anchors, valid, CONFIG)
        context = ours.context(features)
        expected = ours(blocks, context, anchors=anchors, valid=valid, segment_start=jnp.zeros_like(tokens))
    expected = np.asarray(expected).reshape(24, 40)
    for found, wanted in ((hidden, expected), (logits, expected @ weights["lm_head.weight"].T)):
        assert np.abs(found[0].numpy() - wanted).max() / np.abs(wanted).max() < 1e-5


def test_round_trip_is_bit_exact(tmp_path, target):
    directory = export(tmp_path / "draft", target)
    tensors, config = load_draft(directory)
    assert config == CONFIG
    for name, array in random_tensors().items():
        np.testing.assert_array_equal(tensors[name].view(np.int16), array.astype(jnp.bfloat16).view(np.int16))
    again = export_draft(tensors, config, TARGET, tmp_path / "dflash")
    assert load_draft(again)[1] == CONFIG


def edit(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    for name, value in fields.items():
        (config["transformer_layer_config"] if name in config["transformer_layer_config"] else config)[name] = value
    (directory / "config.json").write_text(json.dumps({n: v for n, v in config.items() if v != "gone"}))


def test_reads_what_the_package_wrote(tmp_path, target):
    """Without our own field, and with copies of the target's matrices, as its older versions saved them."""
    directory = export(tmp_path / "draft", target, dtype="float32")
    edit(directory, num_target_layers="gone")
    tensors = load_file(directory / "model.safetensors")
    extra = {"embed_tokens.weight": np.ones((97, 40), np.float32), "verifier_norm.weight": np.ones(40, np.float32)}
    save_file(tensors | extra, directory / "model.safetensors")
    found, config = load_draft(directory)
    assert config == CONFIG
    assert found.keys() == random_tensors().keys()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type='eagle3'"),
        ({"sample_from_anchor": True}, "sample_from_anchor=True"),
        ({"draft_vocab_size": 50}, "draft_vocab_size=50"),
        ({"target_hidden_size": 80}, "target_hidden_size=80"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types='sliding_attention'"),
        (
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "layer_types='sliding_attention'",
        ),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "reads the embedding"),
        ({"aux_hidden_state_layer_ids": [3, 2, 5]}, "ascending"),
        ({"mask_token_id": "gone"}, "no field 'mask_token_id'"),
        ({"num_target_layers": "gone", "speculators_config": {"verifier": {"name_or_path": "x"}}}, "num_target_layers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_refuses_what_it_does_not_compute(tmp_path, target, change, named):
    directory = export(tmp_path / "draft", target)
    edit(directory, **change)
    with pytest.raises(ValueError, match=named):
        load_draft(directory)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (SLIDING, "layer_types"),
        (dataclasses.replace(CONFIG, is_causal=True), "is_causal=True"),
        (dataclasses.replace(CONFIG, output_multiplier=0.5), "output_multiplier=0.5"),
        (dataclasses.replace(CONFIG, input_embedding_scale=2.0), "input_embedding_scale=2.0"),
        (dataclasses.replace(CONFIG, final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
        (dataclasses.replace(CONFIG, target_layer_ids=(1, 2, 6)), "last layer, 6"),
    ],
)
def test_refuses_what_the_form_cannot_say(tmp_path, target, config, named):
    with pytest.raises(ValueError, match=named):
        export(tmp_path / "draft", target, config)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_other_form(tmp_path, target):
    from feature_bridge.torch_draft import TorchDraft

    given = export(tmp_path / "given", target)
    with pytest.raises(ValueError, match=r"python -m jaxdraft\.convert"):
        TorchDraft.load(given, dtype=torch.float32)
    command = [sys.executable, "-m", "jaxdraft.convert", "--draft", str(given), "--target", str(target), "--output"]
    subprocess.run([*command, str(tmp_path / "dflash")], check=True)
    TorchDraft.load(tmp_path / "dflash", dtype=torch.float32)
    dflash = export(tmp_path / "expected", target, form="dflash")
    for file in ("model.safetensors", "config.json", "dflash.py"):
        assert (tmp_path / "dflash" / file).read_bytes() == (dflash / file).read_bytes()
    command[-2] = str(tmp_path)
    done = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert (done.returncode, "has no config.json; give a complete directory" in done.stderr) == (2, True)

"""The exported directory: what the peers compute with it, what is refused, and what a crash leaves."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import CONFIG, K_NORM, SLIDING, TARGET, random_tensors
from safetensors import safe_open
from sglang_reader import sglang_reader

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.convert import load_draft
from jaxdraft.export import check_tensors, export_draft, hf_config
from jaxdraft.model.dflash import bind
from jaxdraft.model.tensors import from_tensors, to_tensors


@pytest.fixture(scope="module")
def peers():
    """z-lab's and SpecForge's draft classes."""
    torchvision_ops.ensure()  # both import transformers' image code
    from dflash.model import DFlashDraftModel as ZLab
    from specforge.modeling.draft.dflash import DFlashDraftModel as SpecForge

    return {"z-lab": ZLab, "specforge": SpecForge}


@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
def test_peers_compute_what_we_compute(tmp_path, peers, config):
    import torch

    tensors = random_tensors(config)
    export_draft(tensors, config, TARGET, tmp_path / "draft", dtype="float32")
    num_context = 23
    generator = np.random.default_rng(1)
    features = generator.normal(size=(1, num_context, config.feature_size)).astype(np.float32)
    block = generator.normal(size=(1, 1, config.block_size, config.hidden_size)).astype(np.float32)
    padded = np.pad(features, ((0, 0), (0, config.block_size), (0, 0)))  # the anchor lies inside the row

    @jax.jit
    def ours(params, block, features):
        model = bind(config, params, jnp.float32)
        return model(
            block,
            model.context(features),
            anchors=jnp.array([[num_context]]),
            valid=jnp.array([[True]]),
            segment_start=jnp.zeros(features.shape[:2], jnp.int32),
        )

    with jax.default_matmul_precision("highest"):
        expected = np.asarray(ours(from_tensors(tensors, config), block, padded))[0, 0]
    position = torch.arange(num_context + config.block_size)[None]
    slot, key = position[0, num_context:, None], position
    causal_window = ((key <= slot) & (slot - key < 9))[None, None]
    masks = {"full_attention": None, "sliding_attention": causal_window}
    for name, peer in peers.items():
        model, report = peer.from_pretrained(tmp_path / "draft", dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), (name, report)
        model.eval()
        with torch.inference_mode():
            got = model(
                position_ids=position,
                noise_embedding=torch.from_numpy(block[0]),
                target_hidden=torch.from_numpy(features),
                attention_mask=masks if name == "specforge" else None,  # z-lab builds its own
            )[0]
        error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (name, error)
        assert model.mask_token_id == 96
        assert list(model.target_layer_ids) == [1, 2, 4]
        assert model.block_size == 6


@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
def test_bfloat16_round_trip_is_bit_exact(tmp_path, config):
    tensors = {name: array.astype(jnp.bfloat16) for name, array in random_tensors(config).items()}
    params = from_tensors(tensors, config)
    export_draft(to_tensors(params, config), config, TARGET, tmp_path / "a")
    again, read_config = load_draft(tmp_path / "a")
    assert read_config == config
    for name, array in tensors.items():
        assert again[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(again[name].view(np.uint16), array.view(np.uint16), err_msg=name)
    export_draft(again, read_config, TARGET, tmp_path / "b")
    for file in ("model.safetensors", "config.json", "export.json", "README.md", "dflash.py"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_masters_are_rounded_to_nearest(tmp_path):
    export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "draft")
    with safe_open(tmp_path / "draft" / "model.safetensors", framework="pt") as stored:
        import torch

        assert len(stored.keys()) == 11 * 3 + 3
        for name, array in random_tensors().items():
            assert torch.equal(stored.get_tensor(name), torch.from_numpy(array).bfloat16()), name


def test_config_has_every_field_of_the_format():
    config = hf_config(SLIDING, TARGET, "bfloat16")
    expected = (
        "architectures model_type attention_bias attention_dropout auto_map block_size bos_token_id eos_token_id "
        "pad_token_id dflash_config dtype head_dim hidden_act hidden_size initializer_range intermediate_size "
        "layer_types max_position_embeddings max_window_layers num_attention_heads num_hidden_layers "
        "num_key_value_heads num_target_layers rms_norm_eps rope_scaling rope_theta rope_parameters sliding_window "
        "use_sliding_window tie_word_embeddings use_cache vocab_size"
    )
    assert set(config) == set(expected.split())
    assert config["eos_token_id"] == [90, 91]  # the top level first
    assert config["pad_token_id"] == 90  # text_config where it has none
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e6
    assert (config["use_sliding_window"], config["sliding_window"]) == (True, 9)
    assert hf_config(CONFIG, TARGET, "bfloat16")["sliding_window"] is None


def test_the_scalars_are_where_each_system_looks(tmp_path):
    """z-lab's class in dflash_config and at the top, SGLang in dflash_config alone."""
    scalars = {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 30.0}
    config = hf_config(dataclasses.replace(CONFIG, **scalars, is_causal=True), TARGET, "bfloat16")
    for fields in (config, config["dflash_config"]):
        assert scalars.items() <= fields.items()
    assert (config["is_causal"], "is_causal" in config["dflash_config"]) == (True, False)
    parse = sglang_reader()["parse_dflash_draft_config"]
    found = parse(draft_hf_config=config)
    assert (found.output_multiplier, found.final_logit_softcapping) == (0.5, 30.0)
    del config["dflash_config"]["output_multiplier"]
    assert parse(draft_hf_config=config).output_multiplier == 1.0  # what it was before: not read at the top


def test_export_json(tmp_path):
    export_draft(
        random_tensors(),
        CONFIG,
        TARGET,
        tmp_path / "d",
        capture="next_layer_input",
        provenance={"step": 12, "run": "x"},
    )
    about = json.loads((tmp_path / "d" / "export.json").read_text())
    assert (about["capture"], about["step"], about["mask_token_id"]) == ("next_layer_input", 12, 96)
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((tmp_path / "d" / name).read_bytes()).hexdigest() == digest


def _with(name, change):
    tensors = random_tensors()
    tensors[name] = change(tensors[name].copy())
    return tensors


def _nan(array):
    array[-1] = np.nan
    return array


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({k: v for k, v in random_tensors().items() if k != K_NORM}, f"{K_NORM} is missing"),
        ({**random_tensors(), "lm_head.weight": np.ones((2, 2))}, "lm_head.weight is not part"),
        (_with("fc.weight", lambda x: x.T), r"fc.weight has shape \[120, 40\], not \[40, 120\]"),
        (_with(K_NORM, _nan), f"{K_NORM} has values that are not finite"),
        (
            _with("norm.weight", lambda x: np.full_like(x, np.finfo(np.float32).max)),
            "norm.weight has values that are not finite in bfloat16",
        ),
        (_with("layers.2.mlp.up_proj.weight", np.zeros_like), r"up_proj.weight is constant \(0\)"),
        (_with("layers.2.mlp.up_proj.weight", np.ones_like), r"up_proj.weight is constant \(1\)"),
        (_with(K_NORM, np.zeros_like), rf"{K_NORM} is constant \(0\)"),
    ],
    ids=["missing", "extra", "shape", "nan", "overflow", "zero", "ones", "zero-norm"],
)
def test_refuses_a_wrong_tensor(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        export_draft(tensors, CONFIG, TARGET, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_norm_is_no_constant():
    check_tensors(_with(K_NORM, np.ones_like), CONFIG, "bfloat16")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": 1e4}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5e6}, "rope_theta"),  # a stale one at the top
        ({"hidden_size": 48}, "hidden_size"),
        ({"vocab_size": 99}, "vocab_size"),
        ({"num_hidden_layers": 8}, "num_target_layers"),
    ],
)
def test_refuses_another_target(tmp_path, change, named):
    target = {**TARGET, "text_config": {**TARGET["text_config"], **change}}
    with pytest.raises(ValueError, match=named):
        export_draft(random_tensors(), CONFIG, target, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_export_and_nothing_else(tmp_path):
    directory = tmp_path / "draft"
    export_draft(random_tensors(seed=1), CONFIG, TARGET, directory)
    (directory / "leftover").touch()
    export_draft(random_tensors(seed=2), CONFIG, TARGET, directory)
    assert sorted(p.name for p in directory.iterdir()) == [
        "README.md",
        "config.json",
        "dflash.py",
        "export.json",
        "model.safetensors",
    ]
    np.testing.assert_array_equal(
        load_draft(directory)[0]["fc.weight"], random_tensors(seed=2)["fc.weight"].astype(jnp.bfloat16)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is not empty and holds no earlier export"):
        export_draft(random_tensors(), CONFIG, TARGET, precious)
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_file_stays_and_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file is a file; give a directory"):
        export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "file")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for seed in (1, 2):
        export_draft(random_tensors(seed=seed), CONFIG, TARGET, tmp_path / "link")
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "file", "link"]


def test_a_crash_leaves_the_earlier_export(tmp_path, monkeypatch):
    directory = tmp_path / "draft"
    export_draft(random_tensors(seed=1), CONFIG, TARGET, directory)
    before = (directory / "model.safetensors").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("jaxdraft.export._write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        export_draft(random_tensors(seed=2), CONFIG, TARGET, directory)
    assert (directory / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]

"""The exported directory: what the peers compute with it, what is refused, and what a crash leaves."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.checkpoint import Checkpoints, as_json, load_params
from jaxdraft.config import Config, DataConfig, TargetConfig
from jaxdraft.convert import Arguments as ConvertArguments
from jaxdraft.convert import convert, load_draft, parse_draft_config
from jaxdraft.export import Arguments, check_tensors, export_draft, export_run, hf_config
from jaxdraft.model.dflash import DraftConfig, bind
from jaxdraft.model.tensors import from_tensors, tensor_table, to_tensors
from jaxdraft.optim import OptimConfig
from jaxdraft.train_step import StepConfig, init_state

CONFIG = DraftConfig(
    hidden_size=40,
    intermediate_size=72,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=97,
    block_size=6,
    target_layer_ids=(1, 2, 4),
    num_target_layers=7,
    mask_token_id=96,
    rope_theta=5e6,
)
SLIDING = dataclasses.replace(
    CONFIG, layer_types=("sliding_attention", "full_attention", "sliding_attention"), sliding_window=9
)
TARGET = {  # a vision-language target: everything in text_config
    "tie_word_embeddings": True,
    "eos_token_id": [90, 91],
    "text_config": {
        "hidden_size": 40,
        "vocab_size": 97,
        "num_hidden_layers": 7,
        "bos_token_id": None,
        "eos_token_id": 91,
        "pad_token_id": 90,
        "rope_parameters": {"rope_theta": 5e6, "mrope_section": [3, 3, 2], "rope_type": "default"},
    },
}


def random_tensors(config=CONFIG, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.normal(1, 0.2, row.exported) if "norm" in name else generator.normal(0, 0.2, row.exported)
        ).astype(np.float32)
        for name, row in tensor_table(config).items()
    }


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


K_NORM = "layers.1.self_attn.k_norm.weight"


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


def test_reads_old_and_new_config_forms():
    old = {k: v for k, v in hf_config(CONFIG, TARGET, "bfloat16").items() if k != "rope_parameters"}
    new = {k: v for k, v in hf_config(CONFIG, TARGET, "bfloat16").items() if k not in ("block_size", "rope_theta")}
    new["dflash_config"] = {**new["dflash_config"], "block_size": 6, "output_multiplier": 0.5, "is_causal": True}
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


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with two checkpoints, the first one rated better."""
    root = tmp_path_factory.mktemp("runs")
    (root / "target").mkdir()
    (root / "target" / "config.json").write_text(json.dumps(TARGET))
    config = Config(
        name="run", target=TargetConfig(path=str(root / "target")), data=DataConfig(train_path="unused.jsonl")
    )
    meta = as_json({"config": config, "draft": SLIDING, "capture": "layer_output"})
    options = StepConfig(num_anchors=1, total_steps=2)
    with Checkpoints(root / "run", keep=3) as checkpoints:
        for step, rated in ((1, 2.5), (2, 2.0)):
            params = from_tensors(random_tensors(SLIDING, seed=step), SLIDING)
            params = {name: jnp.asarray(value) for name, value in params.items()}
            state = init_state(SLIDING, OptimConfig(), options, jax.random.key(0), params=params)
            checkpoints.save(step, state, meta, tau=rated)
    return root / "run"


@pytest.mark.parametrize(("step", "chosen"), [("best", 1), ("latest", 2), ("2", 2), ("first", 1)])
def test_exports_a_checkpoint_of_a_run(run_dir, tmp_path, step, chosen):
    export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), step=step, dtype="float32"))
    tensors, config = load_draft(tmp_path / "draft")
    assert config == SLIDING
    for name, array in random_tensors(SLIDING, seed=chosen).items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    about = json.loads((tmp_path / "draft" / "export.json").read_text())
    assert (about["step"], about["run"], about["capture"]) == (chosen, "run", "layer_output")


def test_a_step_that_is_no_step(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 'bst' \(a number, best, .*there are: 1, 2"):
        export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), step="bst"))


def test_the_target_may_be_a_hub_id(run_dir, tmp_path, monkeypatch):
    """Of which config.json alone is needed: here it lies in the hub's cache, and nothing answers on the network."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(TARGET))
    (snapshot / "tokenizer.json").write_text("{}")
    draft = tmp_path / "draft"
    on_hub = {"target": "org/model", "revision": commit}
    export_run(Arguments(checkpoint=str(run_dir), output=str(draft), **on_hub))
    assert json.loads((draft / "export.json").read_text())["target"] == "org/model"
    convert(ConvertArguments(draft=str(draft), output=str(tmp_path / "converted"), **on_hub))
    assert load_draft(tmp_path / "converted")[1] == SLIDING
    with pytest.raises(ValueError, match="a hub id needs --revision"):
        convert(ConvertArguments(draft=str(draft), output=str(tmp_path / "again"), target="org/model"))


def test_an_output_that_cannot_be(run_dir, tmp_path):
    export = Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"))
    export_run(export)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output .*file/draft cannot be written"):
        export_run(dataclasses.replace(export, output=str(tmp_path / "file" / "draft")))
    draft = str(tmp_path / "draft")
    again = ConvertArguments(draft=draft, output=f"{draft}/../draft", target=str(run_dir.parent / "target"))
    with pytest.raises(ValueError, match="--output .* is --draft itself"):
        convert(again)
    assert load_draft(tmp_path / "draft")[1] == SLIDING


def test_the_export_names_what_made_the_features(run_dir, tmp_path, monkeypatch):
    params, meta = load_params(run_dir)
    monkeypatch.setattr("jaxdraft.export.load_params", lambda *_: (params, meta | {"backend": "sglang 0.5.20 (cpu)"}))
    export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft")))
    assert json.loads((tmp_path / "draft" / "export.json").read_text())["backend"] == "sglang 0.5.20 (cpu)"
    assert "| trained on features of | sglang 0.5.20 (cpu) |" in (tmp_path / "draft" / "README.md").read_text()


def test_a_checkpoint_with_a_missing_tensor_is_not_exported(run_dir, tmp_path, monkeypatch):
    params, meta = load_params(run_dir)
    del params["layers.1.self_attn.k_norm"]
    monkeypatch.setattr("jaxdraft.export.load_params", lambda *_: (params, meta))
    with pytest.raises(ValueError, match=rf"{K_NORM} is missing"):
        export_run(Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft")))
    assert not (tmp_path / "draft").exists()


def test_a_run_whose_target_has_moved(run_dir, tmp_path):
    arguments = Arguments(checkpoint=str(run_dir), output=str(tmp_path / "draft"), target=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="target '.*gone' does not exist.*--target says where it is"):
        export_run(arguments)


def test_the_command_says_one_sentence(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxdraft.export",
        "--checkpoint",
        str(tmp_path / "no"),
        "--output",
        str(tmp_path / "d"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no checkpoints/ folder" in done.stderr
    assert "Traceback" not in done.stderr

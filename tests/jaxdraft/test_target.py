"""What the trainer reads of a target: dimensions, mask token, frozen embedding and head."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import flax, safe_open
from safetensors.numpy import save_file
from tiny_models import FAMILIES, make_model

from jaxdraft.config import DraftOptions, TargetConfig
from jaxdraft.export import export_draft
from jaxdraft.model.dflash import init_params
from jaxdraft.model.tensors import to_tensors
from jaxdraft.start_draft import choose_shape, start_weights
from jaxdraft.target import load_frozen, make_draft_config, open_target, resolve_mask_token

V, H = 13, 6
TEXT = dict(
    hidden_size=H, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=10,
    vocab_size=V, rope_parameters={"rope_theta": 1e7}, rms_norm_eps=1e-5,
)  # fmt: skip


def random_matrix(*shape, dtype=np.float32):
    return np.random.default_rng().standard_normal(shape).astype(dtype)


def write_target(directory, *, tensors=None, vlm=False, tokenizer=None, **top):
    """A target's directory with just what the trainer reads. `tokenizer`: its token ids."""
    config = {"text_config": TEXT, **top} if vlm else {**TEXT, **top}
    (directory / "config.json").write_text(json.dumps(config))
    vocab = {f"t{i}": i for i in (range(5) if tokenizer is None else tokenizer)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    save_file(tensors or {"model.embed_tokens.weight": random_matrix(V, H)}, directory / "model.safetensors")
    return TargetConfig(path=str(directory))


def test_fields_of_a_vlm_come_from_its_text_config(tmp_path):
    config = write_target(tmp_path, vlm=True, tie_word_embeddings=True)
    target = open_target(config)
    assert (target.hidden_size, target.num_layers, target.vocab_size, target.head_dim) == (H, 8, V, 3)
    assert target.rope_theta == 1e7
    draft = make_draft_config(DraftOptions(num_layers=3, block_size=4, head_dim=4), target)
    assert draft.target_layer_ids == (1, 3, 5)
    assert (draft.num_heads, draft.num_kv_heads, draft.intermediate_size) == (2, 1, 10)
    assert (draft.rope_theta, draft.rms_norm_eps, draft.mask_token_id) == (1e7, 1e-5, 5)


@pytest.mark.parametrize("vlm", [False, True])
@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_theta": 10_000, "rope_parameters": {"rope_theta": 1e6}}, 1e6),  # a stale copy at the top
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, 1e6),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_theta": 5}},
            1e6,
        ),
        ({"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None}, 1e6),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e6}}}, 1e6),
        ({"rope_theta": 1e6, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 1e6),
        ({"model_type": "qwen2", "rope_parameters": None}, 1e4),
        ({"model_type": "qwen2_5_vl_text", "rope_parameters": {"type": "mrope"}}, 1e6),
        ({"model_type": "qwen3_vl_text", "rope_parameters": None}, 5e5),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"several rope bases, by layer type \(full_attention 1000000.0, sliding_attention 10000.0\)",
        ),
        ({"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4}, "several rope bases"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta='1e6' is not a positive number"),
        ({"rope_parameters": None}, 1e4),  # as transformers' base class
        ({"model_type": "unheard_of", "rope_parameters": None}, "has no rope_theta in its config.json"),
    ],
)
def test_the_rope_base_is_read_as_transformers_reads_it(tmp_path, fields, base, vlm):
    config = write_target(tmp_path, vlm=vlm, **({"text_config": TEXT | fields, "rope_theta": 7.0} if vlm else fields))
    if isinstance(base, str):
        with pytest.raises(ValueError, match=base):
            _ = open_target(config).rope_theta
    else:
        assert open_target(config).rope_theta == base


@pytest.mark.parametrize(
    "key",
    [
        "model.language_model.embed_tokens.weight",
        "model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
    ],
)
def test_embedding_is_detected_and_tied(tmp_path, key):
    matrix = random_matrix(V, H)
    config = write_target(tmp_path, tensors={key: matrix}, tie_word_embeddings=True)
    embedding, head = load_frozen(config, open_target(config), jnp.float32)
    np.testing.assert_array_equal(embedding, matrix)
    assert head is embedding


def test_a_vlm_may_say_in_its_text_config_that_they_are_tied(tmp_path):
    """And a stale copy of the head beside a tied embedding is not read."""
    text = TEXT | {"tie_word_embeddings": True}
    tensors = {"model.language_model.embed_tokens.weight": random_matrix(V, H), "lm_head.weight": random_matrix(V, H)}
    config = write_target(tmp_path, tensors=tensors, vlm=True, text_config=text)
    embedding, head = load_frozen(config, open_target(config), jnp.float32)
    assert head is embedding
    np.testing.assert_array_equal(embedding, tensors["model.language_model.embed_tokens.weight"])
    config = write_target(tmp_path, tensors=tensors, vlm=True, text_config=text, tie_word_embeddings=False)
    _, head = load_frozen(config, open_target(config), jnp.float32)
    np.testing.assert_array_equal(head, tensors["lm_head.weight"])  # the top level comes first


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_of_each_family(family, tmp_path):
    """As its own class saves them: names, ties and dtype are the checkpoint's."""
    path = make_model(family, tmp_path)
    with safe_open(path / "model.safetensors", "numpy") as file:
        keys = [key for key in file.keys() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]  # noqa: SIM118
        stored = {key.split(".")[-2]: file.get_tensor(key) for key in keys}
    config = TargetConfig(path=str(path))
    embedding, head = load_frozen(config, open_target(config), jnp.float32)
    np.testing.assert_array_equal(embedding, stored["embed_tokens"])
    np.testing.assert_array_equal(head, stored.get("lm_head", stored["embed_tokens"]))
    assert (head is embedding) == ("lm_head" not in stored)


def test_untied_head(tmp_path):
    tensors = {"model.embed_tokens.weight": random_matrix(V, H), "lm_head.weight": random_matrix(V, H)}
    config = write_target(tmp_path, tensors=tensors, tie_word_embeddings=False)
    embedding, head = load_frozen(config, open_target(config), jnp.bfloat16)
    assert embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(head), np.float32(jnp.bfloat16(tensors["lm_head.weight"])))
    np.testing.assert_array_equal(np.float32(embedding), np.float32(jnp.bfloat16(tensors["model.embed_tokens.weight"])))


def test_unknown_and_missing_keys_list_candidates(tmp_path):
    tensors = {"decoder.embed_tokens.weight": random_matrix(V, H), "lm_head.weight": random_matrix(V, H)}
    config = write_target(tmp_path, tensors=tensors)
    with pytest.raises(
        ValueError, match="target.embed_key was not found; set it to one of: decoder.embed_tokens.weight"
    ):
        load_frozen(config, open_target(config), jnp.float32)
    wrong = TargetConfig(path=config.path, embed_key="model.embed.weight")
    with pytest.raises(ValueError, match="model.embed.weight is not among.*candidates: decoder.embed_tokens.weight"):
        load_frozen(wrong, open_target(wrong), jnp.float32)
    right = TargetConfig(path=config.path, embed_key="decoder.embed_tokens.weight")
    assert load_frozen(right, open_target(right), jnp.float32)[0].shape == (V, H)


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.embed_tokens.weight": np.zeros((V, H), np.int8), "model.embed_tokens.weight_scale": random_matrix(V)},
        {"model.embed_tokens.weight": random_matrix(V, H), "lm_head.qweight": np.zeros((V, H), np.int32)},
    ],
)
def test_quantised_embedding_or_head_is_refused(tmp_path, tensors):
    config = write_target(tmp_path, tensors=tensors, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="quantised.*left out of the quantisation"):
        load_frozen(config, open_target(config), jnp.float32)


def test_layers_in_8_bits_beside_a_plain_embedding_and_head_are_fine(tmp_path):
    tensors = {
        "model.embed_tokens.weight": jnp.bfloat16(random_matrix(V, H)),
        "lm_head.weight": jnp.bfloat16(random_matrix(V, H)),
        "model.layers.0.mlp.up_proj.weight": jnp.zeros((4, H), jnp.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": jnp.ones((1, 1)),
    }
    config = write_target(tmp_path, tie_word_embeddings=False, quantization_config={"quant_method": "fp8"})
    flax.save_file(tensors, tmp_path / "model.safetensors")
    embedding, head = load_frozen(config, open_target(config), jnp.bfloat16)
    assert (embedding == tensors["model.embed_tokens.weight"]).all()
    assert (head == tensors["lm_head.weight"]).all()
    flax.save_file(tensors | {"lm_head.weight": jnp.zeros((V, H), jnp.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is quantised \(F8_E4M3\)"):
        load_frozen(config, open_target(config), jnp.bfloat16)


def test_wrong_shape_is_refused(tmp_path):
    config = write_target(
        tmp_path, tensors={"model.embed_tokens.weight": random_matrix(V + 1, H)}, tie_word_embeddings=True
    )
    with pytest.raises(ValueError, match=r"has shape \[14, 6\].*\[13, 6\]"):
        load_frozen(config, open_target(config), jnp.float32)


def test_missing_directories_and_unpinned_hub_ids(tmp_path):
    for path, named in (
        (str(tmp_path / "none"), "does not exist"),
        ("org/model", "needs target.revision"),
        (str(tmp_path), "has no config.json"),
    ):
        with pytest.raises(ValueError, match=named):
            open_target(TargetConfig(path=path))


def test_mask_token_resolution_order(tmp_path):
    target = open_target(write_target(tmp_path, tokenizer=range(9)))
    assert resolve_mask_token(2, target) == 2
    assert resolve_mask_token(None, target) == 9  # len(tokenizer) is unused
    target = open_target(write_target(tmp_path, tokenizer=[i for i in range(V) if i != 4]))
    assert resolve_mask_token(None, target) == 4  # the only unused id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "t7"}}))
    assert resolve_mask_token(None, target) == 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "t8"}))  # as older checkpoints have it
    assert resolve_mask_token(None, target) == 8
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"t4": 4}))
    with pytest.raises(ValueError, match="every id"):
        resolve_mask_token(None, target)
    (tmp_path / "added_tokens.json").unlink()
    target = open_target(write_target(tmp_path, tokenizer=[*range(9), V]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": f"t{V}"}))
    assert resolve_mask_token(None, target) == 10  # the tokenizer's own is no id of the embedding's
    (tmp_path / "tokenizer_config.json").unlink()
    target = open_target(write_target(tmp_path, tokenizer=range(V)))
    with pytest.raises(ValueError, match="every id"):
        resolve_mask_token(None, target)
    with pytest.raises(ValueError, match="draft.mask_token_id=13 is not below.*vocab_size=13"):
        resolve_mask_token(V, target)


def test_a_draft_to_start_from_decides_all_but_the_mask_token(tmp_path):
    """Its mask token, too, where none is given; an option that contradicts it is refused and not passed over."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
    config = write_target(tmp_path / "target", tie_word_embeddings=True)
    target = open_target(config)
    options = DraftOptions(num_layers=2, block_size=4, num_heads=4, num_kv_heads=2, head_dim=4, mask_token_id=11,
                           target_layer_ids=(2, 5), sliding_window=8, num_sliding_layers=1)  # fmt: skip
    trained = make_draft_config(options, target)
    tensors = to_tensors(init_params(trained, jax.random.key(0)), trained)
    exported = export_draft(tensors, trained, target.config, tmp_path / "draft", dtype="float32")

    def choose(**given):
        options = DraftOptions(**{"num_layers": 2, "block_size": 4, "init_from": str(exported)} | given)
        shape = choose_shape(options, target)
        return shape, start_weights(options, shape)

    draft, params = choose()
    assert draft == trained
    np.testing.assert_array_equal(params["fc"], np.asarray(tensors["fc.weight"]).T)
    assert choose(num_heads=4, target_layer_ids=(2, 5), num_sliding_layers=1, sliding_window=8)[0] == trained
    assert choose(mask_token_id=12)[0] == dataclasses.replace(trained, mask_token_id=12)
    with pytest.raises(ValueError, match="draft.mask_token_id=13 is not below"):
        choose(mask_token_id=13)
    for name, value, right in (
        ("num_layers", 3, 2), ("block_size", 5, 4), ("num_heads", 2, 4), ("num_kv_heads", 4, 2), ("head_dim", 2, 4),
        ("intermediate_size", 12, 10), ("target_layer_ids", (2, 6), r"\(2, 5\)"), ("sliding_window", 9, 8),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"draft.{name}=.* is not that of .*; set it to {right}"):
            choose(**{name: value})
    with pytest.raises(ValueError, match="draft.num_sliding_layers=2 is not that of .*; set it to 1"):
        choose(num_sliding_layers=2, sliding_window=8)


# --- of the hub, without the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Where the hub's client looks for org/model at COMMIT; nothing answers on the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    directory = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    return directory


def test_a_cached_snapshot_needs_no_network(snapshot):
    write_target(snapshot)
    target = TargetConfig(path="org/model", revision=COMMIT)
    for weights in (True, False):
        assert open_target(target, weights=weights).directory == snapshot
    with pytest.raises(ValueError, match="target.path='org/model' at target.revision='main'.*not whole in the hub's"):
        open_target(TargetConfig(path="org/model", revision="main"))


def test_a_part_of_a_snapshot_is_not_taken_for_all_of_it(snapshot):
    """`plan` and `export` leave its JSON files, and a broken download some of its shards."""
    write_target(snapshot)
    target = TargetConfig(path="org/model", revision=COMMIT)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_target(target, weights=False).hidden_size == H
    with pytest.raises(ValueError, match="not whole"):
        open_target(target)
    save_file({"b": random_matrix(2, 2)}, snapshot / "model-2.safetensors")
    assert open_target(target).hidden_size == H
    (snapshot / "config.json").write_text(json.dumps({"vision_config": {}, "text_config": TEXT}))
    with pytest.raises(ValueError, match="not whole"):  # its image processor is not there
        open_target(target)
    (snapshot / "preprocessor_config.json").write_text("{}")
    assert open_target(target).hidden_size == H


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "a Git-LFS pointer: run `git lfs pull`",
        ),
        (None, "is not a complete safetensors file.*; download it again"),  # cut off
        (b"", "is not a complete safetensors file.*; download it again"),
    ],
)
def test_broken_weights_are_named(tmp_path, content, said):
    config = write_target(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match=f"{file}.*{said}"):
        load_frozen(config, open_target(config), jnp.float32)


def test_other_broken_files_are_named(tmp_path):
    config = write_target(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.embed_tokens.weight": "gone"}}')
    with pytest.raises(ValueError, match="/gone is not a complete safetensors file"):
        load_frozen(config, open_target(config), jnp.float32)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(ValueError, match="tokenizer.json is not a complete JSON file"):
        make_draft_config(DraftOptions(num_layers=3), open_target(config))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a complete JSON file.*; download it again"):
        open_target(config)


def test_a_config_of_another_kind_is_refused_by_name(tmp_path):
    config = write_target(tmp_path)
    text = {name: value for name, value in TEXT.items() if name != "num_attention_heads"}
    (tmp_path / "config.json").write_text(json.dumps(text | {"n_head": 2}))
    with pytest.raises(ValueError, match="num_attention_heads=None in its config.json"):
        make_draft_config(DraftOptions(num_layers=3), open_target(config))
    assert make_draft_config(DraftOptions(num_layers=3, num_heads=2, head_dim=4), open_target(config)).num_heads == 2

"""SGLang's features against transformers', for every family that SGLang runs on a CPU: text, pictures, mixed extends.

SGLang runs in processes of its own (`sglang_capture.py`), all started once; the references run here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import target_requests
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, LAYER_IDS, TEXT_FAMILIES, frames_together, make_model

from feature_bridge import targets
from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.targets import load_target, sglang_versions
from feature_bridge.targets.base import Extended, split_lengths
from feature_bridge.targets.huggingface import HuggingFaceTarget
from feature_bridge.targets.sglang_visuals import content_hash

EMBEDDED = "embedded"  # the target that comes with the repository
EMBEDDED_PATH = Path(__file__).parents[2] / "configs" / "tiny" / "target"
RUNS = (*FAMILIES, EMBEDDED)
VLM_RUNS = tuple(run for run in RUNS if run not in TEXT_FAMILIES)
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Captured:
    """What one SGLang process saved."""

    tensors: dict[str, torch.Tensor]
    facts: dict

    def extended(self, name: str) -> Extended:
        return Extended(self.tensors[f"{name}/features"], self.tensors.get(f"{name}/hidden"))


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {family: make_model(family, directory) for family in FAMILIES} | {EMBEDDED: EMBEDDED_PATH}


@pytest.fixture(scope="session")
def captures(model_paths, tmp_path_factory) -> dict[str, Future[Captured]]:
    directory = tmp_path_factory.mktemp("captures")
    pool = ThreadPoolExecutor(max_workers=2)
    runs = {run: pool.submit(capture, model_paths[run], run, "float32", directory / run) for run in RUNS}
    # One more process: Qwen3.5 in bfloat16.
    runs["bfloat16"] = pool.submit(capture, model_paths["qwen3_5"], "qwen3_5", "bfloat16", directory / "bfloat16")
    return runs


def capture(model: Path, run: str, dtype: str, out: Path) -> Captured:
    layer_ids = ",".join(map(str, layer_ids_of(run)))
    script = Path(__file__).with_name("sglang_capture.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), str(model), layer_ids, dtype, str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    with safe_open(out, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    return Captured(load_file(out), facts)


def layer_ids_of(run: str) -> tuple[int, ...]:
    return LAYER_IDS.get(run, (0, 3, 6))


@functools.cache
def reference(path: Path, layer_ids: tuple[int, ...], meaning: str = "layer_output", dtype: str = "float32"):
    spec = TargetSpec(path=str(path), layer_ids=layer_ids, dtype=dtype)
    return HuggingFaceTarget(spec, path, max_tokens=512, capture=meaning)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def per_layer(features: torch.Tensor, layer_ids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    return dict(zip(layer_ids, features.chunk(len(layer_ids), dim=-1), strict=True))


# --- SGLang against transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_features_equal_transformers(run, captures, model_paths):
    captured = captures[run].result()
    layer_ids = layer_ids_of(run)
    target = reference(model_paths[run], layer_ids, captured.facts["info"]["capture"])
    for name, requests in target_requests.batches(target.config).items():
        with frames_together():
            got, want = captured.extended(name), target.extend(requests, last_hidden=True)
        lengths = split_lengths(requests)
        for i, (a, b) in enumerate(zip(got.features.split(lengths), want.features.split(lengths), strict=True)):
            for l, state in per_layer(a, layer_ids).items():
                error = relative(state, per_layer(b, layer_ids)[l])
                assert error < TOLERANCE, f"{name}, request {i}, layer {l}: {error:.1e}"
        assert relative(got.hidden, want.hidden) < TOLERANCE, name
        assert relative(captured.tensors[f"{name}/logits"], target.logits(want.hidden)) < TOLERANCE, name


def test_sglangs_qwen2_5_vl_lets_frames_see_each_other(captures, model_paths):
    """Where the families table says so: what SGLang serves is not what transformers computes. A fix will show here."""
    captured = captures["qwen2_5_vl"].result()
    target = reference(model_paths["qwen2_5_vl"], layer_ids_of("qwen2_5_vl"))
    want = target.extend(target_requests.batches(target.config)["one video"]).features
    assert 1e-3 < relative(captured.extended("one video").features, want) < 0.1


def test_a_picture_is_not_taken_for_a_video_with_its_pixels():
    """Of two with one pad value, the tokens of both would be filled with each one's embeddings: see "same pixels"."""
    pixels = torch.randn(4, 3)
    hashes = [content_hash(kind, pixels, grid) for kind in ("image", "video") for grid in ((1, 2, 2), (1, 1, 4))]
    assert len(set(hashes)) == 4
    assert content_hash("image", pixels.clone(), (1, 2, 2)) == hashes[0]
    assert content_hash("image", pixels + 1e-3, (1, 2, 2)) != hashes[0]


@pytest.mark.parametrize("run", RUNS)
def test_a_shift_by_one_layer_would_be_seen(run, captures, model_paths):
    captured = captures[run].result()
    meaning = captured.facts["info"]["capture"]
    layer_ids = layer_ids_of(run)
    num_layers = captured.facts["info"]["num_layers"]
    every = tuple(range(num_layers - 1))
    target = reference(model_paths[run], every, meaning)
    states = per_layer(target.extend(target_requests.batches(target.config)["texts"]).features, every)
    for l, state in per_layer(captured.extended("texts").features, layer_ids).items():
        for other in every:
            error = relative(state, states[other])
            assert error < TOLERANCE if other == l else error > 100 * TOLERANCE


@pytest.mark.parametrize("run", VLM_RUNS)
def test_other_pictures_under_the_same_tokens_give_other_features(run, captures):
    """No embedding of an earlier extend is left behind, and `test_features_equal_transformers` would see one."""
    captured = captures[run].result()
    first, other = captured.extended("mixed").features, captured.extended("other pixels").features
    assert relative(first, other) > 0.01
    wide, tall = captured.extended("other grid").features.chunk(2)
    assert relative(wide, tall) > 0.01  # the same pixels


@pytest.mark.parametrize("run", RUNS)
def test_the_same_extend_gives_the_same_bits(run, captures):
    """Whatever the image-embedding cache held before, and after requests that were refused."""
    tensors = captures[run].result().tensors
    name = "mixed" if run in VLM_RUNS else "texts"
    for what in ("features", "hidden"):
        assert torch.equal(tensors[f"{name}/{what}"], tensors[f"{name} again/{what}"])
    assert torch.equal(tensors["after errors/features"], tensors["texts/features"])


@pytest.mark.parametrize("run", VLM_RUNS)
def test_cached_embeddings_change_no_bit(run, captures):
    """They would if one were kept without its company: the pictures of an extend go through the tower together."""
    captured = captures[run].result()
    tensors = captured.tensors
    assert captured.facts["tower runs"] == {"cold": [5], "warm": [1, 1, 2, 1, 5]}, "pictures of each run"
    assert torch.equal(tensors["cold cache/features"], tensors["warm cache/features"])


@pytest.mark.parametrize("run", VLM_RUNS)
def test_requests_prepared_ahead_give_the_same_features_each_time(run, captures):
    tensors = captures[run].result().tensors
    assert torch.equal(tensors["cold cache/features"], tensors["prepared ahead/features"])


@pytest.mark.parametrize("run", RUNS)
def test_an_extend_that_is_filled_up_gives_the_same(run, captures):
    captured = captures[run].result()
    names = [name for name in captured.tensors if " filled up/" in name]
    assert len(names) >= 2
    for name in names:
        plain = captured.tensors[name.replace(" filled up", "")]
        assert captured.tensors[name].shape == plain.shape
        assert relative(captured.tensors[name], plain) < 1e-5, name


@pytest.mark.parametrize("run", RUNS)
def test_a_sample_does_not_depend_on_its_row(run, captures, model_paths):
    captured = captures[run].result()
    name = "mixed" if run in VLM_RUNS else "texts"
    requests = target_requests.batches(reference(model_paths[run], layer_ids_of(run)).config)[name]
    for i, packed in enumerate(captured.extended(name).features.split(split_lengths(requests))):
        assert relative(packed, captured.tensors[f"{name} alone {i}/features"]) < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_more_requests_than_one_extend_takes(run, captures, model_paths):
    captured = captures[run].result()
    target = reference(model_paths[run], layer_ids_of(run))
    many = [target_requests.text(target.config, 9, seed) for seed in range(40)]
    assert relative(captured.tensors["many/features"], target.extend(many).features) < TOLERANCE


@pytest.mark.parametrize("run", RUNS)
def test_embedding_and_head(run, captures, model_paths):
    """Without the rows that SGLang adds to a vocabulary that is no multiple of 64."""
    target, tensors = reference(model_paths[run], layer_ids_of(run)), captures[run].result().tensors
    assert torch.equal(tensors["embedding/rows"], target.embed([3, 1, 2]))
    for name, matrix in target.frozen().items():
        assert torch.equal(tensors[f"frozen/{name}"], matrix), name


def test_bfloat16_is_as_good_as_transformers_own(captures, model_paths):
    captured = captures["bfloat16"].result()
    path, layer_ids = model_paths["qwen3_5"], layer_ids_of("qwen3_5")
    exact, rounded = reference(path, layer_ids), reference(path, layer_ids, dtype="bfloat16")
    requests = target_requests.batches(exact.config)["mixed"]
    assert captured.extended("mixed").features.dtype == torch.bfloat16
    want = per_layer(exact.extend(requests).features, layer_ids)
    own = per_layer(rounded.extend(requests).features, layer_ids)
    for l, state in per_layer(captured.extended("mixed").features, layer_ids).items():
        assert relative(state, want[l]) < 1.2 * relative(own[l], want[l])


def test_deepstack_meaning_is_the_version_tables(captures, model_paths):
    captured = captures["qwen3_vl"].result()
    version = sglang_versions.installed_version()
    meaning = captured.facts["info"]["capture"]
    assert meaning == sglang_versions.RELEASES[version].deepstack_capture
    other = {"layer_output": "next_layer_input", "next_layer_input": "layer_output"}[meaning]
    target = reference(model_paths["qwen3_vl"], layer_ids_of("qwen3_vl"), other)
    requests = target_requests.batches(target.config)["mixed"]
    got = captured.extended("mixed").features.split(split_lengths(requests))
    want = target.extend(requests).features.split(split_lengths(requests))
    assert relative(got[0], want[0]) < TOLERANCE  # text
    is_image = torch.from_numpy(requests[1].tokens) == target.config.image_token_id
    assert relative(got[1][is_image], want[1][is_image]) > 0.02


@pytest.mark.parametrize("run", RUNS)
def test_mistakes_are_one_sentence(run, captures):
    facts = captures[run].result().facts
    messages = facts["messages"]
    assert "captured layer 0 equals the" in messages["shifted"]
    assert "and the target takes at most" in messages["too long"]
    assert "max_total_tokns" in messages["unknown argument"]
    if run in VLM_RUNS:
        assert "image tokens, but grids" in messages["wrong grid"]
    assert facts["info"]["backend"] == f"sglang {sglang_versions.installed_version()} (cpu)"
    assert any("sgl_kernel" in stand_in for stand_in in facts["info"]["stand_ins"])


# --- the transformers target against transformers' own hidden states -------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@torch.inference_mode()
def test_transformers_target_gives_layer_outputs(run, model_paths):
    layer_ids = layer_ids_of(run)
    target = reference(model_paths[run], layer_ids)
    batches = target_requests.batches(target.config)
    for request in batches.get("mixed", batches["texts"]):
        output = target._model(**target._inputs(request), output_hidden_states=True, use_cache=False)
        want = torch.cat([output.hidden_states[l + 1][0] for l in layer_ids], dim=-1)
        got = target.extend([request], last_hidden=True)
        assert torch.equal(got.features, want)
        assert torch.equal(got.hidden, output.hidden_states[-1][0])
        torch.testing.assert_close(target.logits(got.hidden), output.logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_grids": ((3, 4, 4),)}, "20 video tokens, but grids ((3, 4, 4),) make 12"),
        ({"video_grids": ()}, "20 video tokens without a video"),
        ({"seconds_per_step": ()}, "1 videos, but seconds_per_step=()"),
        ({"video_values": None}, "pixel_values of shape None"),
    ],
)
def test_a_video_that_does_not_fit_its_request(family, change, message, model_paths):
    target = reference(model_paths[family], layer_ids_of(family))
    request = target_requests.videos(target.config, [(5, 4, 4)], 1.0, 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        target.extend([dataclasses.replace(request, **change)])
    broken = request.tokens.copy()
    first = np.flatnonzero(broken == target.config.video_token_id)[1]
    broken[[0, first]] = broken[[first, 0]]
    with pytest.raises(ValueError, match="the video tokens of a frame are not next to each other"):
        target.extend([dataclasses.replace(request, tokens=broken)])


def test_a_text_target_takes_no_videos(model_paths):
    target = reference(model_paths["qwen3"], layer_ids_of("qwen3"))
    request = dataclasses.replace(target_requests.text(target.config, 5, 1), video_grids=((1, 2, 2),))
    with pytest.raises(ValueError, match=r"the target \(qwen3\) takes no videos, and the request has some"):
        target.extend([request])


# --- choosing and refusing -------------------------------------------------------------------------------------------


def spec_of(path: str | Path, layer_ids: tuple[int, ...] = (0, 1), *, max_length: int = 64, **target) -> BridgeSpec:
    return BridgeSpec(
        target=TargetSpec(path=str(path), layer_ids=layer_ids, dtype="float32", **target),
        data=DataSpec(train_path=None, max_length=max_length, min_supervised=1),
        rows_per_slot=1,
        row_tokens=128,
    )


def test_auto_takes_transformers_where_sglang_is_absent(model_paths, monkeypatch, capsys):
    monkeypatch.setattr(sglang_versions, "installed_version", lambda: None)
    target = load_target(spec_of(model_paths["qwen3"]))
    assert target.info.backend.startswith("huggingface transformers")
    assert "SGLang is not installed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="SGLang is not installed in the bridge's Python"):
        load_target(spec_of(model_paths["qwen3"], backend="sglang"))


@pytest.mark.parametrize("meaning", ["layer_output", "next_layer_input"])
def test_every_sglang_is_probed_for_what_it_captures(meaning, model_paths, monkeypatch):
    path = model_paths["qwen3_vl"]

    def unknown_release(spec, directory, **_):
        target = HuggingFaceTarget(spec, directory, max_tokens=512, capture=meaning)
        target.capture_is_known, target.info = False, dataclasses.replace(target.info, capture="layer_output")
        return target

    monkeypatch.setattr(sglang_versions, "installed_version", lambda: "9.9.9")
    monkeypatch.setattr("feature_bridge.targets.sglang.SGLangTarget", unknown_release)
    target = load_target(spec_of(path, (0, 1), backend="sglang", cuda_graphs=False))
    assert target.info.capture == meaning
    probed = []
    monkeypatch.setattr(targets, "check_layer_contract", lambda target, _: probed.append(target) or "layer_output")
    for version in ("9.9.9", "0.5.20"):
        monkeypatch.setattr(sglang_versions, "installed_version", lambda version=version: version)
        load_target(spec_of(model_paths["qwen3"], (0, 1), backend="sglang", cuda_graphs=False))
    assert len(probed) == 2


def test_pools_that_are_smaller_than_a_sample(model_paths, monkeypatch):
    """SGLang lowers them without a word where the memory does not suffice."""

    def small(spec, directory, **_):
        target = HuggingFaceTarget(spec, directory, max_tokens=100)
        target.capture_is_known = True
        return target

    monkeypatch.setattr(sglang_versions, "installed_version", lambda: "0.5.20")
    monkeypatch.setattr("feature_bridge.targets.sglang.SGLangTarget", small)
    with pytest.raises(ValueError, match=r"takes 100 tokens at once, fewer than data\.row_tokens=101; raise"):
        load_target(spec_of(model_paths["qwen3"], backend="sglang", max_length=101))
    load_target(spec_of(model_paths["qwen3"], backend="sglang", max_length=100, cuda_graphs=False))


@pytest.mark.parametrize(
    ("layer_ids", "message"),
    [((0, 3), "last layer"), ((1, 0), "ascending"), ((1, 1), "ascending"), ((), "ascending"), ((-1, 0), r"\[0, 2\]")],
)
def test_layers_that_cannot_be_captured(layer_ids, message, model_paths):
    with pytest.raises(ValueError, match=message):
        load_target(spec_of(model_paths["qwen3"], layer_ids))


@pytest.mark.parametrize(
    ("path", "message"),
    [("no/such/dir", "does not exist"), ("/nowhere", "does not exist"), ("org/name", "needs target.revision")],
)
def test_no_such_model(path, message):
    with pytest.raises(ValueError, match=message):
        load_target(spec_of(path))


def test_directory_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_target(spec_of(tmp_path))


def test_samples_longer_than_the_context(model_paths):
    with pytest.raises(ValueError, match=r"data\.row_tokens=5000 is longer than the target's context of 4096"):
        load_target(spec_of(model_paths["qwen3"], max_length=5000))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lm_head.weight", torch.zeros(2, 2, dtype=torch.float8_e4m3fn)),
        ("lm_head.weight_packed", torch.zeros(2, 2, dtype=torch.int32)),
        ("model.embed_tokens.weight_scale", torch.zeros(2)),
    ],
)
def test_quantised_embedding_or_head_is_refused(name, tensor, tmp_path):
    save_file({name: tensor, "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"quantised (lm_head|embed_tokens)"):
        targets.check_not_quantised(tmp_path)


def test_quantised_layers_are_fine(tmp_path):
    tensors = {"lm_head.weight": torch.zeros(2, 2), "model.layers.0.mlp.up_proj.qweight": torch.zeros(2).int()}
    save_file(tensors, tmp_path / "m.safetensors")
    targets.check_not_quantised(tmp_path)


def test_a_model_that_transformers_does_not_know(model_paths, tmp_path):
    directory = shutil.copytree(model_paths["qwen3"], tmp_path / "target")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    with pytest.raises(
        ValueError, match=r"target.path=.*transformers [\d.]+ it has model_type='qwen9'.*install"
    ) as error:
        load_target(spec_of(directory, backend="huggingface"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "said"), [("pointer", "run `git lfs pull`"), ("shard", "names b.safetensors, which")]
)
def test_weights_that_are_not_all_there(damage, said, model_paths, tmp_path):
    directory = shutil.copytree(model_paths["qwen3"], tmp_path / "target")
    if damage == "pointer":
        (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    else:
        index = {"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{directory}.*{said}"):
        load_target(spec_of(directory))

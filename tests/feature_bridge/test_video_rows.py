"""Videos through the worker on the embedded target: rows against transformers' own call, late failures, decoding."""

import base64
import json

import numpy as np
import pytest
import torch
import video_helpers
from PIL import Image
from safetensors.torch import save_file
from sample_helpers import TINY_TARGET, chat, data_url, picture, write_jsonl
from test_decode import random_draft
from test_worker import fill

from feature_bridge.contracts import BridgeSpec, DataSpec, Decode, TargetSpec
from feature_bridge.decode import prompt_of
from feature_bridge.worker import Worker

LAYER_IDS = (0, 3, 6)
ANSWER = "It moves from the left to the right, and then it stops."


def video_part(frames, fps):
    return {"type": "video", "video": [data_url(Image.fromarray(frame)) for frame in frames], "fps": fps}


@pytest.fixture(scope="module")
def shown():
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (5, 48, 80, 3), np.uint8), picture(rng, 64, 48)


@pytest.fixture(scope="module")
def worker(shown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    frames, image = shown
    rng = np.random.default_rng(6)
    moving = video_helpers.encode(video_helpers.frames(rng, 20), 10)
    (folder / "moving.mp4").write_bytes(moving)
    (folder / "cut.mp4").write_bytes(moving[: len(moving) // 2])
    question = [video_part(frames, 2.0), {"type": "image", "image": data_url(image)}, {"type": "text", "text": "What?"}]
    records = [
        chat("Hi", ANSWER),
        chat(question, ANSWER),
        chat([{"type": "video_url", "video_url": {"url": "moving.mp4"}}, {"type": "text", "text": "What?"}], ANSWER),
        chat([{"type": "video", "video": "cut.mp4"}], ANSWER),
        chat([video_part(frames[:1], 2.0)], ANSWER),
    ]
    path = write_jsonl(folder / "train.jsonl", records)
    target = TargetSpec(path=str(TINY_TARGET), backend="huggingface", dtype="float32", layer_ids=LAYER_IDS)
    data = {"train_path": str(path), "eval_path": str(path), "max_length": 256, "min_supervised": 4, "num_workers": 1}
    options = {"rows_per_slot": 1, "row_tokens": 331, "num_slots": 2, "feature_dtype": "float32"}
    return Worker(BridgeSpec(target=target, data=DataSpec(**data), **options)), folder


def test_index_names_what_is_left_out(worker):
    table = worker[0].ready.indexes["train"]
    assert np.frombuffer(table.num_videos, np.uint8).tolist() == [0, 1, 1]
    assert {skip.where: skip.reason.split(": ")[0] for skip in table.skipped}.keys() == {
        "train.jsonl:4",
        "train.jsonl:5",
    }
    assert table.counts["skipped: broken video"] == 2


@torch.inference_mode()
def test_row_with_text_video_and_picture_equals_transformers(worker, shown):
    from transformers.video_utils import VideoMetadata

    filled, slot = fill(worker[0], (0, 1, 2))
    assert filled[0].samples == (0, 1, 2)
    (frames, image), own, target = shown, worker[0].processor.videos._loaded, worker[0].target
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    text = own.apply_chat_template(chat(content, ANSWER)["messages"], tokenize=False, enable_thinking=False)
    inputs = own(
        text=[text],
        images=[image],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(total_num_frames=5, fps=2.0, frames_indices=[0, 1, 2, 3, 4])],
        do_sample_frames=False,
        return_tensors="pt",
    )
    states = target._model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    want = torch.cat([states[l + 1][0] for l in LAYER_IDS], dim=-1)
    start = worker[0].indexes["train"].entries[0].length
    got = slot["features"][0, start : start + len(want)]
    assert slot["tokens"][0, start : start + len(want)].tolist() == inputs["input_ids"][0].tolist()
    assert float((got - want).norm() / want.norm()) < 1e-6


def test_a_video_that_is_gone_is_masked_out_of_its_row(worker):
    _, clean = fill(worker[0], (0, 1, 2))
    file = worker[1] / "moving.mp4"
    content = file.read_bytes()
    file.write_bytes(content[:-99])
    try:
        filled, slot = fill(worker[0], (0, 1, 2))
    finally:
        file.write_bytes(content)
    assert filled[0].samples == (0, 1)
    (skip,) = filled[0].skipped
    assert skip.where == "train.jsonl:3"
    end = sum(entry.length for entry in worker[0].indexes["train"].entries[:2])
    assert torch.equal(slot["features"][0, :end], clean["features"][0, :end])
    assert not slot["loss_mask"][0, end:].any()


def test_decoding_a_conversation_with_videos(worker, tmp_path):
    bridge, _ = worker
    config, weights = random_draft(128, LAYER_IDS, 1279, 1280)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    decoded = bridge.decode(Decode(request_id=1, draft_path=str(tmp_path), samples=(1, 2), max_new_tokens=8))
    assert [sample.sample for sample in decoded.samples] == [1, 2]
    for sample in decoded.samples:
        assert sample.tokens == sample.target_tokens
    prompt = prompt_of(bridge.indexes["eval"].sample(1), bridge.processor)
    assert [tuple(grid) for grid in prompt.video_grids] == [(3, 4, 4)]
    assert len(prompt.video_values) == 48
    assert prompt.seconds_per_step == (1.0,)


def test_data_url_of_a_file_is_the_file(worker):
    bridge, folder = worker
    url = "data:video/mp4;base64," + base64.b64encode((folder / "moving.mp4").read_bytes()).decode()
    question = [{"type": "video", "video": url}, {"type": "text", "text": "What?"}]
    from feature_bridge.samples import make_sample

    sample = make_sample(chat(question, ANSWER), "x", folder, bridge.processor, bridge._spec.data)
    assert sample.digest == bridge.indexes["train"].entries[2].digest

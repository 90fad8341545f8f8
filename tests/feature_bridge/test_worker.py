"""The worker: rows of samples to slots, with the transformers target and the repository's own tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import feature_bridge.worker
from feature_bridge.contracts import BridgeSpec, DataSpec, Decode, Row, SlotLayout, TargetSpec
from feature_bridge.memory import CPU, slot_arrays
from feature_bridge.requests import request_of
from feature_bridge.targets.base import Extended, Request
from feature_bridge.worker import Worker

TARGET = Path(__file__).parents[2] / "configs" / "tiny" / "target"
LAYER_IDS = (0, 2, 5)
ROW_TOKENS = 331
BY_TOKEN = ("tokens", "segment_start", "loss_mask", "features")
NUM_PICTURES = 4


def conversation(number: int, pictures: list[str]) -> dict:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    question = [*parts, {"type": "text", "text": f"question {number}"}]
    answer = f"answer number {number}, and some more words so that there is something to learn"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"sample-{number}", "messages": messages}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        Image.fromarray(rng.integers(0, 255, (64, 48 + 16 * i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    pictures = [[], ["0.png"], ["1.png", "2.png"], [], ["3.png"], []]
    lines = [json.dumps(conversation(i, some)) for i, some in enumerate(pictures)]
    (folder / "train.jsonl").write_text("\n".join([*lines[:5], "{broken"]))
    (folder / "eval.jsonl").write_text(lines[5])
    return folder


def spec_of(data: Path, feature_dtype: str = "bfloat16", rows: int = 2, **target) -> BridgeSpec:
    return BridgeSpec(
        target=TargetSpec(
            **{"path": str(TARGET), "backend": "huggingface", "dtype": "float32", "layer_ids": LAYER_IDS} | target
        ),
        data=DataSpec(
            train_path=str(data / "train.jsonl"),
            eval_path=str(data / "eval.jsonl"),
            max_length=256,
            min_supervised=4,
            num_workers=1,
        ),
        rows_per_slot=rows,
        row_tokens=ROW_TOKENS,
        num_slots=2,
        feature_dtype=feature_dtype,
    )


@pytest.fixture(scope="module")
def worker(data) -> Worker:
    return Worker(spec_of(data, "float32"))


def fill(worker: Worker, *rows: tuple[int, ...], dtype: str = "float32"):
    """(filled rows, the slot's tensors). The slot is full of rubbish before."""
    layout = SlotLayout(len(rows), ROW_TOKENS, worker.ready.feature_width, dtype)
    memory = torch.full((layout.slot_bytes + layout.ALIGNMENT,), 0xA5, dtype=torch.uint8)
    slot = slot_arrays(layout, memory.data_ptr(), (CPU, 0))
    requests = tuple(Row(row_id=7 + i, samples=samples) for i, samples in enumerate(rows))
    filled = worker.fill("train", requests, slot)
    return filled, {name: torch.from_dlpack(producer).clone() for name, producer in slot.items()}


def own_request(worker: Worker, position: int) -> Request:
    return request_of(worker.indexes["train"].sample(position), worker.processor)


class Broken:
    """A target that gives wrong features for its n-th token."""

    def __init__(self, target, change):
        self._target, self._change = target, change

    def __getattr__(self, name):
        return getattr(self._target, name)

    def extend(self, requests, *, last_hidden=False):
        return Extended(self._change(self._target.extend(requests).features.clone()), None)


class Exhausted:
    """A target whose first `times` calls of `method` find no memory left."""

    def __init__(self, target, method: str, times: int):
        self._target, self._method, self._times = target, method, times

    def __getattr__(self, name):
        function = getattr(self._target, name)
        if name != self._method:
            return function

        def call(*args, **options):
            self._times -= 1
            if self._times >= 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*args, **options)

        return call


@pytest.mark.parametrize("method", ["extend", "prepare"])  # the vision tower runs in either
def test_a_target_without_memory_is_asked_once_more(worker, monkeypatch, method):
    expected, tensors = fill(worker, (1, 2), (0,))
    target = worker.target
    monkeypatch.setattr(worker, "target", Exhausted(target, method, 1))
    filled, again = fill(worker, (1, 2), (0,))
    assert filled == expected
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    monkeypatch.setattr(worker, "target", Exhausted(target, method, 99))
    with pytest.raises(ValueError, match=r"GPU memory in rows \[7, 8\]; raise bridge\.memory_fraction, .*max_pixels"):
        fill(worker, (1, 2), (0,))


class Alternating:
    """The next target of `targets` at every extend; everything else is `target`'s."""

    def __init__(self, targets, target):
        self._targets, self._target = targets, target

    def __getattr__(self, name):
        return getattr(self._target, name)

    def extend(self, requests, **options):
        return next(self._targets).extend(requests, **options)


def test_ready_says_what_the_trainer_needs(worker):
    ready = worker.ready
    assert ready.feature_width == len(LAYER_IDS) * ready.target.hidden_size
    assert ready.target.backend.startswith("huggingface")
    assert len(ready.indexes["train"].sample_ids) == 5
    assert ready.indexes["eval"].sample_ids == ("sample-5",)
    assert len(ready.indexes["train"].skipped) == 1


def test_rows_of_text_and_pictures(worker):
    rows = ((0, 2, 3), (1, 4))
    filled, slot = fill(worker, *rows)
    for r, row in enumerate(rows):
        start = 0
        for position in row:
            sample = worker.indexes["train"].sample(position)
            end = start + len(sample.tokens)
            assert np.array_equal(slot["tokens"][r, start:end].numpy(), sample.tokens)
            assert np.array_equal(slot["loss_mask"][r, start:end].numpy(), sample.loss_mask)
            assert (slot["segment_start"][r, start:end] == start).all()
            want = worker.target.extend([own_request(worker, position)]).features
            assert torch.equal(slot["features"][r, start:end], want)
            start = end
        assert filled[r].row_id == slot["row_ids"][r] == 7 + r
        assert filled[r].num_tokens == slot["num_tokens"][r] == start
        assert filled[r].samples == row
        assert filled[r].skipped == ()
        assert (slot["segment_start"][r, start:] == start).all()
        for name in ("tokens", "loss_mask", "features"):
            assert not slot[name][r, start:].any()


def test_a_row_without_samples_is_padding(worker):
    filled, slot = fill(worker, (), (0,))
    assert filled[0].num_tokens == 0
    assert filled[0].samples == ()
    for name in BY_TOKEN:
        assert not slot[name][0].any(), name
    assert filled[1].num_tokens > 0


def test_features_are_cast_to_the_slots_precision(worker, data):
    rounded = Worker(spec_of(data, "bfloat16", rows=1))
    _, exact = fill(worker, (1, 0), ())
    filled, slot = fill(rounded, (1, 0), dtype="bfloat16")
    assert slot["features"].dtype == torch.bfloat16
    assert torch.equal(slot["features"][0], exact["features"][0].to(torch.bfloat16))
    assert filled[0].num_tokens < ROW_TOKENS


@pytest.mark.parametrize("damage", ["vanished", "truncated", "another picture", "other size"])
def test_a_picture_that_fails_later_is_masked_out_of_its_row(damage, worker, data):
    before, clean = fill(worker, (0, 1, 3), (2,))
    picture = data / "0.png"
    content = picture.read_bytes()
    other = {"another picture": (64, 48), "other size": (64, 96)}
    try:
        if damage == "vanished":
            picture.unlink()
        elif damage == "truncated":
            picture.write_bytes(content[: len(content) // 2])
        else:
            Image.new("RGB", other[damage][::-1], "red").save(picture)
        filled, slot = fill(worker, (0, 1, 3), (2,))
    finally:
        picture.write_bytes(content)

    assert filled[0].samples == (0, 3)
    (skip,) = filled[0].skipped
    assert skip.where == "train.jsonl:2"
    assert "sample-1" in skip.reason
    assert filled[0].num_tokens == before[0].num_tokens  # nothing is repacked
    assert torch.equal(slot["segment_start"], clean["segment_start"])
    lengths = [len(worker.indexes["train"].sample(i).tokens) for i in (0, 1)]
    masked = slice(lengths[0], sum(lengths))
    assert not slot["features"][0, masked].any()
    assert not slot["loss_mask"][0, masked].any()
    for name in BY_TOKEN:
        keep = torch.ones(ROW_TOKENS, dtype=torch.bool)
        keep[masked] = False
        assert torch.equal(slot[name][0, keep], clean[name][0, keep])
        assert torch.equal(slot[name][1], clean[name][1])
    assert fill(worker, (0, 1, 3), (2,))[0] == before


def test_data_that_is_gone_ends_the_run(tmp_path):
    """Else it would train on empty rows to its end."""
    lines = [json.dumps(conversation(i, [])) for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.jsonl").write_text(lines[0])
    worker = Worker(spec_of(tmp_path, "float32"))
    (tmp_path / "train.jsonl").rename(tmp_path / "moved")  # its disk is unmounted, say
    for _ in range(5):
        (filled, _), _ = fill(worker, (0, 1, 2), (0, 1, 2))
        assert [skip.where for skip in filled.skipped] == [f"train.jsonl:{i}" for i in (1, 2, 3)]
    (tmp_path / "moved").rename(tmp_path / "train.jsonl")
    assert fill(worker, (0,), ())[0][0].samples == (0,)
    (tmp_path / "train.jsonl").unlink()
    for _ in range(5):
        fill(worker, (0, 1, 2), (0, 1, 2))
    with pytest.raises(ValueError, match="No such file.*, and the 31 samples before it are unreadable, too; restore"):
        fill(worker, (0, 1, 2), (0, 1, 2))


def test_a_request_that_the_target_refuses_is_masked_out(worker, monkeypatch):
    monkeypatch.setattr(worker.target, "max_tokens", len(worker.indexes["train"].sample(0).tokens))
    filled, _ = fill(worker, (0, 2), ())
    assert filled[0].samples == (0,)
    assert "the target takes at most" in filled[0].skipped[0].reason


def set_token(token: int, layer: int, value: float):
    def change(features):
        features.chunk(len(LAYER_IDS), dim=-1)[layer][token] = value
        return features

    return change


@pytest.mark.parametrize(
    ("change", "bad", "reason"),
    [
        (set_token(-1, 1, torch.nan), 2, "sample-3: NaN or infinite features of layers [2]"),
        (set_token(0, 2, torch.inf), 0, "sample-0: NaN or infinite features of layers [5]"),
        (set_token(60, 0, 0.0), 1, "sample-1: all zero features of layers [0]"),
        (set_token(60, 0, torch.nan), 1, "sample-1: NaN or infinite features of layers [0]"),
    ],
)
def test_bad_features_of_one_sample_do_not_lose_the_row(change, bad, reason, worker, monkeypatch):
    row = (0, 1, 3)
    before, clean = fill(worker, row, (2,))
    lengths = [len(worker.indexes["train"].sample(i).tokens) for i in row]
    assert lengths[0] <= 60 < lengths[0] + lengths[1]
    rows = iter([Broken(worker.target, change), worker.target])  # the first row's extend only
    monkeypatch.setattr(worker, "target", Alternating(rows, worker.target))
    filled, slot = fill(worker, row, (2,))
    assert filled[0].samples == tuple(i for n, i in enumerate(row) if n != bad)
    (skip,) = filled[0].skipped
    assert skip.where == f"train.jsonl:{row[bad] + 1}"
    assert reason in skip.reason
    assert filled[1] == before[1]
    assert filled[0].num_tokens == before[0].num_tokens
    masked = slice(sum(lengths[:bad]), sum(lengths[: bad + 1]))
    keep = torch.ones(ROW_TOKENS, dtype=torch.bool)
    keep[masked] = False
    for name in BY_TOKEN:
        assert torch.equal(slot[name][0, keep], clean[name][0, keep])
        assert torch.equal(slot[name][1], clean[name][1])
    assert not slot["features"][0, masked].any()
    assert not slot["loss_mask"][0, masked].any()
    assert torch.equal(slot["tokens"], clean["tokens"])


def test_a_bad_sample_alone_in_its_row(worker, monkeypatch):
    monkeypatch.setattr(worker, "target", Broken(worker.target, torch.zeros_like))
    filled, slot = fill(worker, (0,), ())
    assert filled[0].samples == ()
    assert "all zero features of layers [0, 2, 5]" in filled[0].skipped[0].reason
    assert not slot["loss_mask"].any()
    assert not slot["features"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.zeros_like, r"samples sample-0, sample-1: all zero features of layers \[0, 2, 5\]"),
        (lambda features: features[:-1], "samples sample-0, sample-1: layers of shape"),
        (lambda features: features[:, 1:], "samples sample-0, sample-1: layers of shape"),
        (lambda features: features.chunk(3, dim=-1)[0], "samples sample-0, sample-1: layers of shape"),
    ],
)
def test_a_target_that_is_wrong_for_everybody(change, message, worker, monkeypatch):
    monkeypatch.setattr(worker, "target", Broken(worker.target, change))
    with pytest.raises(ValueError, match=message):
        fill(worker, (0, 1), ())


def test_a_row_that_is_too_long(worker):
    with pytest.raises(ValueError, match=rf"row 7 has \d+ tokens, more than data\.row_tokens={ROW_TOKENS}"):
        fill(worker, tuple([0] * 20), ())


def test_the_probe_runs_at_start(data):
    with pytest.raises(ValueError, match="last layer's output cannot be captured"):
        Worker(spec_of(data, layer_ids=(1, 7)))


def test_decoding_needs_held_out_data(worker, monkeypatch):
    monkeypatch.delitem(worker.indexes, "eval")
    with pytest.raises(ValueError, match=r"data\.eval_path"):
        worker.decode(Decode(request_id=1, draft_path="x", samples=(0,), max_new_tokens=4))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("grid", "image tokens, but grids"),
        ("pixels", "pixel_values of shape"),
        ("no picture", "image tokens without a picture"),
        ("token", "ids in [0, 1280)"),
        ("negative token", "ids in [0, 1280)"),
    ],
)
def test_a_request_that_does_not_fit_itself_is_masked_out(damage, reason, worker, monkeypatch):
    index = worker.indexes["train"]
    whole, render = type(index).sample, feature_bridge.requests.render_inputs

    def sample(self, position):
        found = whole(self, position)
        if position == 1 and "token" in damage:
            tokens = found.tokens.copy()
            tokens[2] = -1 if damage == "negative token" else 1280
            found = dataclasses.replace(found, tokens=tokens)
        return found

    def inputs(found, processor):
        pixels, grids = render(found, processor)
        if found.tokens.tobytes() != whole(index, 1).tokens.tobytes():
            return pixels, grids
        if damage == "grid":
            grids = ((1, grids[0][1], grids[0][2] + 2),)
        if damage == "pixels":
            pixels = pixels[:-1]
        return (None, ()) if damage == "no picture" else (pixels, grids)

    before, clean = fill(worker, (0, 1, 3), (2,))
    monkeypatch.setattr(type(index), "sample", sample)
    monkeypatch.setattr(feature_bridge.requests, "render_inputs", inputs)
    filled, slot = fill(worker, (0, 1, 3), (2,))
    assert filled[0].samples == (0, 3)
    assert filled[1] == before[1]
    (skip,) = filled[0].skipped
    assert skip.where == "train.jsonl:2"
    assert reason in skip.reason
    assert torch.equal(slot["features"][1], clean["features"][1])
    assert torch.equal(slot["loss_mask"][1], clean["loss_mask"][1])


def test_pictures_are_prepared_ahead(worker, monkeypatch):
    """`prepare` reads each sample once, and `fill` takes what it has read."""
    seen, read = [], worker._prepare
    monkeypatch.setattr(worker, "_prepare", lambda split, position: seen.append(position) or read(split, position))
    worker.prepare("train", (Row(row_id=7, samples=(1, 2)), Row(row_id=8, samples=(4,))))
    filled, _ = fill(worker, (1, 2), (4,))
    assert sorted(seen) == [1, 2, 4]
    assert [row.samples for row in filled] == [(1, 2), (4,)]
    filled, _ = fill(worker, (1, 1), ())  # a sample twice
    assert filled[0].samples == (1, 1)
    assert not worker._ahead


def test_bridges_that_share_a_row_write_their_part_of_its_features(worker, monkeypatch):
    """Two halves make the whole row; everything else is the same on both, a fault beyond one's own half included."""
    rows = (Row(row_id=0, samples=(0, 1, 3)), Row(row_id=1, samples=(4, 2)))

    def spoiled(states):
        states[: len(states) // 4] = np.nan  # in the first half of the row
        return states

    def halves(parts: int):
        for place in range(parts):
            spec = dataclasses.replace(worker._spec, row_tokens=330, feature_slice=(place, parts))
            layout = spec.slot_layout(worker.ready.feature_width)
            monkeypatch.setattr(worker, "_spec", spec)
            monkeypatch.setattr(worker, "_layout", layout)
            memory = torch.full((layout.slot_bytes + layout.ALIGNMENT,), 0xA5, dtype=torch.uint8)
            slot = slot_arrays(layout, memory.data_ptr(), (CPU, 0))
            filled = worker.fill("train", rows, slot)
            yield filled, {name: torch.from_dlpack(producer).clone() for name, producer in slot.items()}

    for target in (worker.target, Broken(worker.target, spoiled)):
        monkeypatch.setattr(worker, "target", target)
        ((filled, whole),) = halves(1)
        (filled_a, first), (filled_b, second) = halves(2)
        assert first["features"].shape == (2, 165, worker.ready.feature_width)
        torch.testing.assert_close(torch.cat([first["features"], second["features"]], dim=1), whole["features"])
        for name in ("row_ids", "num_tokens", "tokens", "segment_start", "loss_mask"):
            assert torch.equal(first[name], whole[name])
            assert torch.equal(second[name], whole[name])
        samples = [[row.samples for row in rows] for rows in (filled, filled_a, filled_b)]
        assert samples[0] == samples[1] == samples[2]
    assert any(row.skipped for row in filled)


def test_slots_on_another_gpu_are_filled_from_a_row_put_together_beside_the_target(worker, monkeypatch):
    """One copy of the row goes there, and it holds what a slot beside the target would."""
    rows = ((0, 2, 3), (1,))
    filled, beside = fill(worker, *rows)
    monkeypatch.setattr(worker, "_spec", dataclasses.replace(worker._spec, slot_gpu=1))
    written: list[tuple[int, ...]] = []
    copy = torch.Tensor.copy_

    def noted(self, source, *args, **options):
        written.extend([tuple(source.shape)] if source.ndim == 2 else [])
        return copy(self, source, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    filled_there, there = fill(worker, *rows)
    assert written == [(ROW_TOKENS, worker.ready.feature_width)] * 2
    assert filled == filled_there
    for name, tensor in beside.items():
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("slots", "beside"), [("cpu", True), ("cuda", False)])
def test_a_row_of_a_targets_gpu_is_put_together_there(slots, beside, parts, worker, monkeypatch):
    """`shared_memory` beside a GPU: torch concatenates only into memory of the states' own device. GPUs are made up."""
    spec = dataclasses.replace(worker._spec, feature_slice=(0, parts))
    monkeypatch.setattr(worker, "_spec", spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, device, **__: device)
    slot = SimpleNamespace(is_cpu=slots == "cpu", device=torch.device(slots), shape=(4, 8), dtype=torch.bfloat16)
    expected = torch.device("cuda", 0) if beside or parts > 1 else slot
    assert worker._feature_buffer(slot) == expected

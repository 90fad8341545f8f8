"""The index: what is left out and why, the cache, held-out data, and the way back to a sample."""

import dataclasses
import gzip
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image
from sample_helpers import TINY_TARGET, chat, data_spec, data_url, load_family, picture, png, wrap, write_jsonl

from feature_bridge import index as index_module
from feature_bridge import scan as scan_module
from feature_bridge.contracts import TargetSpec
from feature_bridge.index import build_indexes, format_counts
from feature_bridge.media import MediaError
from feature_bridge.partial_index import ProgressLines, kept
from feature_bridge.samples import render_inputs

TARGET = TargetSpec(path=str(TINY_TARGET), layer_ids=(0,))


@pytest.fixture(scope="module")
def processor():
    return wrap(load_family("qwen3.5"))


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def scans(monkeypatch):
    """Counts the scans that the cache did not save."""
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return scan_module.scan(*arguments)

    monkeypatch.setattr(index_module, "scan", counting)
    return calls


def build(path, processor, target=TARGET, **changes):
    return build_indexes(target, data_spec(train_path=str(path), **changes), processor)


def texts(count, prefix="answer"):
    return [chat(f"Question {i}?", f"{prefix} number {i}", id=f"{prefix}-{i}") for i in range(count)]


def ids(index):
    return [entry.sample_id for entry in index.entries]


# --- what is left out -------------------------------------------------------------------------------------------------


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def image_part(url):
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]


def sharegpt(question, images):
    pair = [{"from": "human", "value": question}, {"from": "gpt", "value": "An answer."}]
    return {"conversations": pair, "images": images}


PAD = "<|vision_start|><|image_pad|><|vision_end|>"
BAD_LINES = {
    "bad json": ('{"messages": [', "broken line", "not JSON: "),
    "half a surrogate pair": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "broken line", "surrogates"),
    "not an object": ("[1, 2]", "broken line", "expected a JSON object, got list"),
    "no turns": ({"text": "Hi"}, "broken line", "neither 'messages' nor 'conversations'"),
    "empty turns": ({"messages": []}, "broken line", "neither 'messages' nor 'conversations'"),
    "turn is text": ({"messages": ["Hi"]}, "broken line", "turn 0 is str"),
    "content is a number": (turns(("user", 5), ("assistant", "A")), "broken line", "turn 0 has content of type int"),
    "content is null": (
        turns(("user", "Q"), ("assistant", None)),
        "broken line",
        "turn 1 has content of type NoneType",
    ),
    "unknown role": (turns(("user", "Q"), ("robot", "A")), "broken line", "turn 1 has the unknown role 'robot'"),
    "role of a wrong type": (turns((["user"], "Q"), ("assistant", "A")), "broken line", "unknown role"),
    "no assistant turn": (turns(("user", "Q")), "broken line", "no assistant turn"),
    "unknown part": (turns(("user", [{"type": "audio"}]), ("assistant", "A")), "broken line", "type 'audio'"),
    "missing video": (chat([{"type": "video", "video": "a.mp4"}], "A"), "broken video", "video /"),
    "one frame": (
        chat([{"type": "video", "video": ["ok.png"]}, {"type": "text", "text": "What?"}], "A"),
        "broken video",
        "has 1 frames; it needs two",
    ),
    "no frames": (chat([{"type": "video", "video": []}], "A"), "broken video", "has 0 frames"),
    "text as a video": (chat([{"type": "video", "video": "text.png"}], "A"), "broken video", "cannot be read"),
    "frames of two sizes": (
        chat([{"type": "video", "video": ["ok.png", "thin.png"]}], "A"),
        "broken video",
        "frames of several sizes",
    ),
    "a frame that is missing": (
        chat([{"type": "video", "video": ["ok.png", "no.png"]}], "A"),
        "broken video",
        "no.png does not exist",
    ),
    "video with nframes": (
        chat([{"type": "video", "video": "a.mp4", "nframes": 3}], "A"),
        "broken line",
        "nframes, which is not read",
    ),
    "video in an answer": (
        turns(("user", "Q"), ("assistant", [{"type": "video", "video": ["ok.png", "ok.png"]}])),
        "broken line",
        "turn 1 has a video in a assistant turn",
    ),
    "video with fps 0": (
        chat([{"type": "video", "video": ["ok.png", "ok.png"], "fps": 0}], "A"),
        "broken video",
        "fps=0, expected a positive number",
    ),
    "no video for a marker": (sharegpt("<video>Q", None), "video placeholder count", "1, videos given: 0"),
    "picture in an answer": (
        turns(("user", "Q"), ("assistant", [{"type": "image", "image": "ok.png"}])),
        "broken line",
        "turn 1 has a picture in a assistant turn",
    ),
    "missing file": (chat(image_part("nowhere.png"), "A"), "broken picture", "nowhere.png does not exist"),
    "folder": (chat(image_part("."), "A"), "broken picture", "cannot be read"),
    "truncated": (chat(image_part("truncated.png"), "A"), "broken picture", "truncated.png does not decode"),
    "no picture": (chat(image_part("text.png"), "A"), "broken picture", "is not an image file"),
    "remote": (chat(image_part("https://host/a.png"), "A"), "broken picture", "is remote"),
    "bad data URL": (chat(image_part("data:image/png;base64,@@"), "A"), "broken picture", "data URL does not decode"),
    "picture of a wrong type": (chat("Q", "A", images=[3]), "broken picture", "picture given as 3"),
    "extreme aspect ratio": (
        chat(image_part("thin.png"), "A"),
        "broken picture",
        "the image processor: absolute aspect",
    ),
    "too many markers": (sharegpt("<image><image>Q", ["ok.png"]), "image placeholder count", "2, pictures given: 1"),
    "marker without picture": (sharegpt("<image>Q", None), "image placeholder count", "1, pictures given: 0"),
    "too few markers": (sharegpt("<image>Q", ["ok.png", "ok.png"]), "image placeholder count", "1, pictures given: 2"),
    "placeholder in the text": (chat(PAD, "A"), "image placeholder count", "1, pictures given: 0"),
    "placeholder too many": (
        chat([*image_part("ok.png"), {"type": "text", "text": PAD}], "A"),
        "image placeholder count",
        "2",
    ),
    "video placeholder": (chat("<|video_pad|>", "A"), "video placeholder count", "1, videos given: 0"),
    "short": (chat("Q", ""), "too few supervised tokens", "1 supervised tokens, fewer than 2 (2 x draft.block_size)"),
}


@pytest.fixture(scope="module")
def bad_index(processor, tmp_path_factory):
    """One file with every bad line, good ones around each, and a blank line in between."""
    folder = tmp_path_factory.mktemp("bad")
    image = png(picture(np.random.default_rng(), 64, 64))
    (folder / "ok.png").write_bytes(image)
    (folder / "truncated.png").write_bytes(image[: len(image) // 2])
    (folder / "text.png").write_text("not a picture")
    Image.new("RGB", (300, 1)).save(folder / "thin.png")
    good = chat(image_part("ok.png"), "A good answer.", id="good")
    lines = [line for bad, *_ in BAD_LINES.values() for line in (good, bad)]
    path = write_jsonl(folder / "train.jsonl", ["", *lines, good])
    return build(path, processor, min_supervised=2)["train"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_skipped_with_its_number_and_reason(name, bad_index):
    _, kind, reason = BAD_LINES[name]
    number = 3 + 2 * list(BAD_LINES).index(name)
    skipped = {skip.where: skip.reason for skip in bad_index.skipped}
    assert reason in skipped[f"train.jsonl:{number}"]
    assert bad_index.counts[f"skipped: {kind}"] == sum(k == kind for _, k, _ in BAD_LINES.values())


def test_unusual_pictures_are_used_and_a_bomb_is_not(processor, rng, tmp_path):
    """1x1, larger than max_pixels, other modes, 16 bits, animated: all in one file, with one that is too big."""
    colour = picture(rng, 70, 50)
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
    colour.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(rng.integers(0, 1 << 16, (50, 70), np.uint16)).save(tmp_path / "deep.png")
    colour.save(tmp_path / "moving.webp", save_all=True, append_images=[picture(rng, 70, 50)], duration=50)
    picture(rng, 1, 1).save(tmp_path / "dot.png")
    picture(rng, 700, 500).save(tmp_path / "large.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    names = ["cmyk.jpg", "palette.gif", "deep.png", "bomb.png", "moving.webp", "dot.png", "large.png"]
    path = write_jsonl(tmp_path / "t.jsonl", [chat("Q", "A", images=[name], id=name) for name in names])
    index = build(path, processor)["train"]
    assert ids(index) == [name for name in names if name != "bomb.png"]
    assert [skip.where for skip in index.skipped] == ["t.jsonl:4"]
    assert "is too large to decode safely" in index.skipped[0].reason  # (long paths are shortened)
    for position in range(len(index)):
        sample = index.sample(position)
        pixels, grids = render_inputs(sample, processor)
        assert (len(pixels), grids) == (np.prod(grids), sample.image_grids)
        assert np.isfinite(pixels).all()
        most = processor.image_processor.size["longest_edge"] // processor.image_processor.patch_size**2
        assert len(pixels) <= most


def test_the_other_lines_survive(bad_index):
    assert ids(bad_index) == ["good"] * (len(BAD_LINES) + 1)
    assert len(bad_index.skipped) == bad_index.counts["skipped"] == len(BAD_LINES)
    assert bad_index.counts["records"] == 2 * len(BAD_LINES) + 1
    table = bad_index.table()
    assert (table.counts, table.skipped) == (bad_index.counts, bad_index.skipped)
    for line in (f"skipped {len(BAD_LINES)}", f"samples {len(BAD_LINES) + 1}", "skipped: broken picture 8"):
        assert re.search(
            rf"^{line.rsplit(' ', 1)[0]} +{line.rsplit(' ', 1)[1]}$", format_counts({"train": table}), re.M
        )


def test_not_utf8_and_byte_order_mark(processor, tmp_path):
    good = json.dumps(texts(1)[0]).encode()
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b'{"a": "\xff"}\r\n\r\n' + good)
    index = build(tmp_path / "t.jsonl", processor)["train"]
    assert ids(index) == ["answer-0", "answer-0"]
    assert [skip.where for skip in index.skipped] == ["t.jsonl:2"]


def test_table_lists_a_thousand_and_counts_all(processor, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [*texts(1), *["{"] * 1200])
    table = build(path, processor)["train"].table()
    assert len(table.skipped) == 1001
    assert (table.skipped[-1].reason, table.counts["skipped"]) == ("and 200 more", 1200)


def test_no_data(processor, tmp_path):
    with pytest.raises(ValueError, match=r"data.train_path='.*empty.jsonl' is empty"):
        build(write_jsonl(tmp_path / "empty.jsonl", ["", " "]), processor)
    with pytest.raises(ValueError, match=r"data.train_path='.*none.jsonl' cannot be read \(No such file"):
        build(tmp_path / "none.jsonl", processor)
    path = write_jsonl(tmp_path / "short.jsonl", [*texts(3), "{"])
    reason = r"no sample that fits, of 4 records: 3 x too few supervised tokens \(short.jsonl:1: .*\); 1 x broken line"
    with pytest.raises(ValueError, match=reason):
        build(path, processor, min_supervised=1000)
    with pytest.raises(ValueError, match=r"data.eval_path='.*empty.jsonl' is empty"):
        build(write_jsonl(tmp_path / "good.jsonl", texts(2)), processor, eval_path=str(tmp_path / "empty.jsonl"))


# --- columns, samples, digest -----------------------------------------------------------------------------------------


def test_columns_and_samples_agree(processor, rng, tmp_path):
    records = texts(3) + [chat("Q", "A", images=[data_url(picture(rng, 64, 64))] * n, id=f"p{n}") for n in (1, 3, 260)]
    records += [chat("Q", "word " * 50, id="long")]
    index = build(write_jsonl(tmp_path / "t.jsonl", records), processor, max_length=2000)["train"]
    table = index.table()
    samples = [index.sample(position) for position in range(len(index))]
    assert np.frombuffer(table.lengths, "<i4").tolist() == [len(sample.tokens) for sample in samples]
    assert np.frombuffer(table.supervised, "<i4").tolist() == [sample.num_supervised for sample in samples]
    assert np.frombuffer(table.num_images, np.uint8).tolist() == [0, 0, 0, 1, 3, 255, 0]
    assert table.sample_ids == ("answer-0", "answer-1", "answer-2", "p1", "p3", "p260", "long")
    assert table.counts["pictures"] == 264
    assert table.counts["tokens"] == sum(len(sample.tokens) for sample in samples)
    assert table.digest == index.digest


def test_vanished_or_changed_data_is_noticed(processor, rng, tmp_path):
    (tmp_path / "p.png").write_bytes(png(picture(rng, 64, 64)))
    path = write_jsonl(tmp_path / "t.jsonl", [chat("Q", "A", images=["p.png"], id="with"), *texts(2)])
    index = build(path, processor)["train"]
    index.sample(0)
    (tmp_path / "p.png").write_bytes(png(picture(rng, 64, 64)))
    with pytest.raises(MediaError, match=r"sample with \(t.jsonl:1\) has changed since it was indexed"):
        index.sample(0)
    (tmp_path / "p.png").unlink()
    with pytest.raises(MediaError, match=r"sample with \(t.jsonl:1\): picture .*p.png does not exist"):
        index.sample(0)
    assert index.sample(2).sample_id == "answer-1"
    path.write_text(path.read_text().replace("number 1", "number 7"))
    with pytest.raises(MediaError, match=r"sample answer-1 \(t.jsonl:3\) has changed"):
        index.sample(2)


def test_digest_covers_what_features_depend_on(processor, rng, tmp_path):
    def digest(records, name="t.jsonl", **changes):
        return build(write_jsonl(tmp_path / name, records), processor, **changes)["train"].digest

    def pictured():
        return [chat("Q", "A", images=[data_url(picture(rng, 64, 64))])]

    records = texts(4)
    table = build(write_jsonl(tmp_path / "t.jsonl", records), processor)["train"].table()
    base = table.digest
    assert digest([*records, "{"], "moved.jsonl") == base
    assert digest(records[::-1]) != base
    assert digest(records[:3]) != base
    assert digest([*records[:3], chat("Question 3?", "another")]) != base
    assert digest(records, max_length=int(np.frombuffer(table.lengths, "<i4").max()) - 1) != base
    assert digest(pictured()) != digest(pictured())
    coarser = wrap(load_family("qwen3.5"))
    coarser.image_processor.image_mean = [0.4, 0.5, 0.5]
    same = pictured()
    path = write_jsonl(tmp_path / "t.jsonl", same)
    assert build(path, processor)["train"].digest != build(path, coarser)["train"].digest


def test_dataset_folder_equals_jsonl(processor, rng, tmp_path):
    import datasets

    image = picture(rng, 70, 50)
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    records = [chat(question, "That.", id="a"), chat(question[1:], "Nothing.", id="b")]
    path = write_jsonl(tmp_path / "t.jsonl", [records[0] | {"images": [data_url(image)]}, records[1], "{"])
    rows = [records[0] | {"images": [image]}, records[1] | {"images": None}, chat(question[1:], "A", id="c")]
    rows[2]["messages"][1]["role"] = "robot"
    # One type a column: content is a list everywhere.
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")

    from_file, from_folder = (build(p, processor)["train"] for p in (path, tmp_path / "folder"))
    assert [e.digest for e in from_file.entries] == [e.digest for e in from_folder.entries]
    assert from_folder.skipped[0].where == "folder:2"
    assert from_folder.sample(0).digest == from_file.sample(0).digest
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]; give the folder of one of them"):
        build(tmp_path / "splits", processor)
    with pytest.raises(ValueError, match="is a folder that `datasets.save_to_disk` did not write"):
        build(tmp_path, processor)


# --- held-out data ----------------------------------------------------------------------------------------------------


def test_held_out_share_is_stable(processor, tmp_path):
    records = texts(60)
    indexes = build(write_jsonl(tmp_path / "t.jsonl", records), processor, eval_fraction=0.3)
    held_out = set(ids(indexes["eval"]))
    assert 3 <= len(held_out) <= 40
    assert held_out.isdisjoint(ids(indexes["train"]))
    assert len(indexes["train"]) + len(held_out) == 60

    more = records + texts(20, "another")
    random.shuffle(more)
    changed = build(write_jsonl(tmp_path / "t.jsonl", more), processor, eval_fraction=0.3)
    assert {name for name in ids(changed["eval"]) if name.startswith("answer")} == held_out
    assert held_out <= set(ids(build(tmp_path / "t.jsonl", processor, eval_fraction=0.5)["eval"]))
    assert changed["eval"].sample(0).sample_id == ids(changed["eval"])[0]


def test_eval_file(processor, tmp_path):
    train, held_out = write_jsonl(tmp_path / "t.jsonl", texts(5)), write_jsonl(tmp_path / "e.jsonl", texts(2, "held"))
    indexes = build(train, processor, eval_path=str(held_out), eval_fraction=0.5)
    assert [len(indexes["train"]), ids(indexes["eval"])] == [5, ["held-0", "held-1"]]
    only = build_indexes(TARGET, data_spec(train_path=None, eval_path=str(held_out)), processor)
    assert list(only) == ["eval"]
    with pytest.raises(ValueError, match=r"data.eval_fraction=1e-09 leaves 5 samples to train on and 0 held out"):
        build(train, processor, eval_fraction=1e-9)


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(processor, rng, tmp_path, scans):
    """A function that builds the same index through one cache; and its data file."""
    (tmp_path / "p.png").write_bytes(png(picture(rng, 64, 64)))
    records = [chat("Q", "A", images=["p.png"], id="with"), chat("Q", "A", images=["later.png"]), *texts(3), "{"]
    path = write_jsonl(tmp_path / "t.jsonl", records)

    def build_cached(**changes):
        return build(path, processor, cache_dir=str(tmp_path / "cache"), **changes)["train"]

    return build_cached, path


def test_cache_gives_the_same_index(cached, scans):
    build_cached, path = cached
    first, second = build_cached(), build_cached()
    assert len(scans) == 1
    assert first.entries == second.entries
    assert first.table() == second.table()
    assert second.sample(0).digest == first.sample(0).digest
    os.utime(path)  # the content counts, not the time
    build_cached()
    assert len(scans) == 1


@pytest.mark.parametrize(
    "change", ["line", "picture", "new picture", "gone picture", "max_length", "min_supervised", "template"]
)
def test_cache_is_left_when_anything_changes(change, cached, scans, processor, rng, tmp_path):
    build_cached, path = cached
    build_cached()
    if change == "line":
        path.write_text(path.read_text().replace("number 1", "number 7"))
    elif change == "picture":
        (tmp_path / "p.png").write_bytes(png(picture(rng, 65, 64)))
    elif change == "new picture":
        (tmp_path / "later.png").write_bytes(png(picture(rng, 64, 64)))
    elif change == "gone picture":
        (tmp_path / "p.png").unlink()
    elif change == "template":
        other = dataclasses.replace(processor, chat_template=processor.chat_template.replace("trim", "upper"))
        build(path, other, cache_dir=str(tmp_path / "cache"))
    if change in ("max_length", "min_supervised"):
        build_cached(**{change: {"max_length": 400, "min_supervised": 2}[change]})
    elif change != "template":
        build_cached()
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other rows", "flipped"])
def test_damaged_cache_is_built_again(damage, cached, scans, tmp_path, capsys):
    build_cached, _ = cached
    first = build_cached()
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "garbage": b"{}",
        "empty": b"",
        "other rows": gzip.compress(b"[]"),
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[damage]
    file.write_bytes(damaged)
    assert build_cached().entries == first.entries
    assert len(scans) == 2
    assert "is damaged and is built again" in capsys.readouterr().err
    build_cached()
    assert len(scans) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_folder_that_cannot_be_written(processor, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", texts(1))
    with pytest.raises(ValueError, match=r"data.cache_dir='.*t.jsonl' cannot be written"):
        build(path, processor, cache_dir=str(path))


# --- worker processes -------------------------------------------------------------------------------------------------


def test_worker_processes_give_the_same_index(processor, rng, tmp_path, monkeypatch):
    records = [*texts(100), "{", chat("Q", "Ü", images=[data_url(picture(rng, 64, 64))]), *texts(50, "more")]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    alone = build(path, processor)["train"]
    monkeypatch.setattr(scan_module, "IN_PROCESS_ROWS", 0)
    calls = []
    data = data_spec(train_path=str(path), num_workers=2)
    together = build_indexes(TARGET, data, processor, lambda *done: calls.append(done))["train"]
    assert together.entries == alone.entries
    assert together.table() == alone.table()
    assert sorted(calls) == [(row + 1, len(records)) for row in range(len(records))]


def test_dead_worker_is_an_error(processor, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "t.jsonl", texts(70))
    monkeypatch.setattr(scan_module, "IN_PROCESS_ROWS", 0)
    monkeypatch.setattr(scan_module.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"a process that indexes data.train_path=.* ended with code 1"):
        build(path, processor, num_workers=2)


# --- an index that is interrupted -------------------------------------------------------------------------------------


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_index_goes_on(workers, processor, rng, tmp_path, monkeypatch):
    """With a line that was cut short, a picture that has changed since, and another number of processes."""
    shown = tmp_path / "a.png"
    shown.write_bytes(png(picture(rng, 64, 64)))
    records = [chat("Q", "A picture.", images=[str(shown)]), *texts(150), "{", *texts(50, "more")]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    data = data_spec(train_path=str(path), num_workers=workers or 1, cache_dir=str(tmp_path / "cache"))

    def interrupt(done, total):
        if done == 90:
            raise Interrupt

    with pytest.raises(Interrupt):
        build_indexes(TARGET, data, processor, interrupt)
    (partial,) = (tmp_path / "cache").glob("index-*.partial")
    with partial.open("a") as file:
        file.write('[150, "an id", 1')
    shown.write_bytes(png(picture(rng, 96, 64)))

    if workers:
        monkeypatch.setattr(scan_module, "IN_PROCESS_ROWS", 0)
    calls, kept_rows = [], 90 - 1
    index = build_indexes(TARGET, data, processor, lambda *done: calls.append(done))["train"]
    assert calls == [(done, len(records)) for done in range(kept_rows + 1, len(records) + 1)]
    assert index.table() == build(path, processor)["train"].table()
    assert not partial.exists()


def test_two_processes_do_not_keep_the_same_rows(processor, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", texts(3))
    with kept(tmp_path / "p.partial") as (_, keep), kept(tmp_path / "p.partial") as (known, other):
        keep(scan_module.Entry(row=0))
        other(scan_module.Entry(row=1))
        assert known == {}
    assert not (tmp_path / "p.partial").exists()
    assert len(build(path, processor)["train"]) == 3


def test_progress_is_a_line_now_and_then():
    lines = []
    for every_s in (3600, 0):
        progress = ProgressLines(every_s, lines.append)
        progress(100, 1500)
    assert lines == ["index: 100 of 1,500 records (7%)"]

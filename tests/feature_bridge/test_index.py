"""The index: its columns, the cache, held-out data, and the way back to a sample."""

import dataclasses
import datetime
import gzip
import os
import random

import numpy as np
import pytest
from index_helpers import TARGET, build, ids, texts
from sample_helpers import QWEN3_TEMPLATE, chat, data_spec, data_url, load_family, picture, png, wrap, write_jsonl

from feature_bridge import index as index_module
from feature_bridge import scan as scan_module
from feature_bridge.index import build_indexes
from feature_bridge.media import MediaError
from feature_bridge.partial_index import ProgressLines, kept


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


def test_a_template_that_writes_the_date_gives_the_same_sample_tomorrow(tmp_path, monkeypatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 6)

    loaded = load_family("qwen3")
    loaded.chat_template = "{{ strftime_now('%d %b %Y') if strftime_now is defined }}" + QWEN3_TEMPLATE  # Llama 3.2's
    path = write_jsonl(tmp_path / "t.jsonl", texts(1))
    index = build(path, wrap(loaded))["train"]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert build(path, wrap(loaded))["train"].digest == index.digest
    index.sample(0)  # of a run that goes on past midnight


def test_pictures_beside_a_link(processor, rng, tmp_path):
    """A download of the hub: snapshots/COMMIT/* are links into blobs/."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(png(picture(rng, 40, 40)))
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/1")
    write_jsonl(blobs / "2", [chat("Q", "A", images=["images/a.png"], id="with")])
    (snapshot / "t.jsonl").symlink_to("../../blobs/2")
    assert ids(build(snapshot / "t.jsonl", processor)["train"]) == ["with"]


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
    "change", ["line", "picture", "new picture", "gone picture", "max_length", "min_supervised", "template", "pillow"]
)
def test_cache_is_left_when_anything_changes(change, cached, scans, processor, rng, tmp_path, monkeypatch):
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
    elif change == "pillow":
        monkeypatch.setattr("PIL.__version__", "99.0")  # which may read what this one cannot
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

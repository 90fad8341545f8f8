"""The index: what is left out, and why."""

import json
import re

import numpy as np
import pytest
from index_helpers import build, ids, texts
from PIL import Image
from sample_helpers import chat, load_family, picture, png, wrap, write_jsonl

from feature_bridge.index import format_counts
from feature_bridge.samples import render_inputs


@pytest.fixture(scope="module")
def processor():
    return wrap(load_family("qwen3.5"))


@pytest.fixture
def rng():
    return np.random.default_rng()


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
        "field that is not read",
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


def test_unknown_keys_that_change_nothing_are_counted(processor, tmp_path):
    """Each once, by the samples that have it; those known to change nothing are not."""
    known = {"source": "a.jpg", "score": 3, "tags": ["x"], "metadata": {"seen": [1, 2]}, "chosen": [{"role": "user"}]}
    records = [chat("Q", f"A {i}", **known, shelf="b", **({} if i else {"batch no": 7})) for i in range(3)]
    index = build(write_jsonl(tmp_path / "t.jsonl", [*records, "{"]), processor)["train"]
    assert {name: n for name, n in index.counts.items() if "ignored" in name} == {
        "ignored key: shelf": 3,
        "ignored key: batch no": 1,
    }
    assert re.search(r"^ignored key: shelf +3$", format_counts({"train": index.table()}), re.M)
    many = [chat("Q", f"A {i}", **{f"k{i}": i}) for i in range(25)]
    counts = build(write_jsonl(tmp_path / "many.jsonl", many), processor)["train"].counts
    assert sum("ignored key" in name for name in counts) == 20
    assert counts["ignored: other keys"] == 5


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

"""Videos: what is read of them, against the files' own makers, and samples against the processors' own expansion."""

import base64
import importlib.util
import io

import av
import numpy as np
import pytest
import torch
import video_helpers
from sample_helpers import chat, data_spec, data_url, load_family, picture, png, wrap, write_jsonl

from feature_bridge import video
from feature_bridge.contracts import TargetSpec
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.index import build_indexes
from feature_bridge.media import MediaError, SampleError
from feature_bridge.processors import make_processor
from feature_bridge.requests import request_of
from feature_bridge.samples import make_sample, media_files, render_videos
from feature_bridge.video import Video

torchvision_ops.ensure()
from transformers.video_utils import VideoMetadata  # noqa: E402

FAMILIES = ("qwen3.5", "qwen3-vl", "qwen2.5-vl")


@pytest.fixture(scope="module")
def loaded():
    return {family: load_family(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def processors(loaded):
    return {family: wrap(processor) for family, processor in loaded.items()}


@pytest.fixture
def rng():
    return np.random.default_rng()


def part(value, **more):
    return {"type": "video", "video": value} | more


def text(content):
    return {"type": "text", "text": content}


def mp4_url(encoded):
    return "data:video/mp4;base64," + base64.b64encode(encoded).decode()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")]
)
def test_file_gives_its_frames(container, codec, rng, tmp_path):
    made = video_helpers.frames(rng, 11, width=80)
    file = tmp_path / "v"
    file.write_bytes(video_helpers.encode(made, 5, container, codec))
    each = video.resolve("v", None, tmp_path)
    contents = video.read(each)
    assert video.inspect(each, contents) == video.Clip(11, 5.0, 48, 80)
    shown = video.decode(each, contents, (0, 4, 10))
    assert (shown.shape, shown.dtype) == ((3, 48, 80, 3), np.uint8)
    assert np.abs(shown.astype(int) - made[[0, 4, 10]]).mean() < 6  # compression
    assert np.abs(shown.astype(int) - made[[1, 5, 9]]).mean() > 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_need_no_decoder(kind, rng, monkeypatch):
    monkeypatch.setattr(video, "decoder", lambda: "")
    made = video_helpers.frames(rng, 5)
    each = Video(video_helpers.animated(made, kind, 250))
    assert video.inspect(each, (each.source,)) == video.Clip(5, 4.0, 48, 64)
    assert np.abs(video.decode(each, (each.source,), (1, 4)).astype(int) - made[[1, 4]]).max() <= 2


def test_listed_frames(rng, tmp_path):
    made = [picture(rng, 30, 20) for _ in range(3)]
    made[0].save(tmp_path / "0.png")
    each = video.resolve(["0.png", data_url(made[1]), {"bytes": png(made[2])}], 1.5, tmp_path)
    contents = video.read(each)
    assert video.inspect(each, contents) == video.Clip(3, 1.5, 20, 30)
    assert np.array_equal(video.decode(each, contents, (0, 2)), np.stack([made[0], made[2]]))
    assert video.inspect(Video(each.source), contents).fps == video.LISTED_FPS


def test_a_telephones_upright_video_is_upright(rng):
    made = video_helpers.frames(rng, 3, width=64, height=32)
    each = Video(video_helpers.turn_by_a_quarter(video_helpers.encode(made)))
    clip = video.inspect(each, (each.source,))
    assert (clip.height, clip.width) == (64, 32)
    shown = video.decode(each, (each.source,), (0, 1)).astype(int)
    assert np.abs(shown - np.rot90(made[:2], -1, axes=(1, 2))).mean() < 6


def test_bad_files(rng, monkeypatch):
    whole = video_helpers.encode(video_helpers.frames(rng, 9))
    bad = {
        "cannot be read": [b"", b"no video at all" * 50, whole[: len(whole) // 2]],
        "has 1 frames; it needs two": [video_helpers.encode(video_helpers.frames(rng, 1)), png(picture(rng, 9, 9))],
    }
    for reason, contents in bad.items():
        for encoded in contents:
            with pytest.raises(MediaError, match=reason) as error:
                video.inspect(Video("v.mp4"), (encoded,))
            assert error.value.kind == "broken video"
    cut = video_helpers.encode(video_helpers.frames(rng, 9), container="matroska")
    cut = cut[: len(cut) * 2 // 3]
    kept = video.inspect(Video("v"), (cut,)).num_frames  # Matroska does not say how many there should be
    assert kept < 9
    with pytest.raises(MediaError, match="ends before frame 8"):
        video.decode(Video("v"), (cut,), (0, 8))
    monkeypatch.setattr(video, "decoder", lambda: "")
    with pytest.raises(MediaError, match="no video decoder: `pip install av`") as error:
        video.inspect(Video("v.mp4"), (whole,))
    assert error.value.kind == "no video decoder"


@pytest.mark.parametrize("group", [1, 4, 12])
def test_a_trimmed_file_has_the_frames_that_are_shown(group, rng):
    """Trimmed without encoding it again: an MP4 announces frames that its edit list leaves out.

    Those of earlier groups of pictures are not read at all, those of the group that it begins in are discarded.
    """
    made = video_helpers.frames(rng, 20)
    options = {"g": str(group), "sc_threshold": "1000000000"}
    encoded = video_helpers.encode(made, earlier=7, options=options)
    each = Video("v.mp4")
    assert video.inspect(each, (encoded,)).num_frames == 13
    shown = video.decode(each, (encoded,), range(13))
    assert np.abs(shown.astype(int) - made[7:]).mean() < 6


def test_a_file_whose_end_is_missing(rng, tmp_path):
    """Its index stands at the start, so it opens, and says how many frames there should be."""
    with (
        av.open(io.BytesIO(video_helpers.encode(video_helpers.frames(rng, 20)))) as made,
        av.open(str(tmp_path / "v.mp4"), "w", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(made.streams.video[0])
        for packet in made.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    encoded = (tmp_path / "v.mp4").read_bytes()
    assert video.inspect(Video("v.mp4"), (encoded,)).num_frames == 20
    with pytest.raises(MediaError, match=r"is cut off: 1\d of 20 frames are there"):
        video.inspect(Video("v.mp4"), (encoded[: len(encoded) * 5 // 6],))


def test_frames_that_a_cut_took_the_reference_of_are_not_counted(rng):
    """A transport stream that begins within an open group of pictures, and one that begins at a keyframe."""
    made = video_helpers.frames(rng, 24)
    counts = {}
    for lost in (0, 3, 10, 12):
        options = {"g": "12", "bf": "2"}
        encoded = video_helpers.encode(made, 25, "mpegts", "mpeg2video", options=options, lost=lost)
        counts[lost] = video.inspect(Video("v.ts"), (encoded,)).num_frames
        assert len(video.decode(Video("v.ts"), (encoded,), range(counts[lost]))) == counts[lost]
    assert counts[0] == 24
    assert counts[10] < 14


def test_decoder_is_named(monkeypatch):
    import av

    assert video.decoder() == f"av {av.__version__}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert video.decoder() == ""


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [4, 7])
def test_listed_frames_equal_the_processors_own(family, count, loaded, processors, rng, tmp_path):
    """Two videos, a picture and two answers, against transformers' own call with the same frames."""
    videos = [rng.integers(0, 256, (n, 70, 90, 3), np.uint8) for n in (count, 2)]
    image = picture(rng, 60, 40)
    given = [part([data_url(_image(frame)) for frame in frames], fps=4.0) for frames in videos]
    turns = [[text("First "), given[0], text("?")], [{"type": "image", "image": data_url(image)}, given[1], text("Q")]]
    answers = ["It moves, <0.5 seconds> long.", "Still."]
    record = {"messages": []}
    for question, answer in zip(turns, answers, strict=True):
        record["messages"] += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = make_sample(record, "x:1", tmp_path, processors[family], data_spec())

    messages = [m | {"content": _kinds(m["content"])} for m in record["messages"]]
    rendered = loaded[family].apply_chat_template(messages, tokenize=False, enable_thinking=False)
    metadata = [VideoMetadata(total_num_frames=len(v), fps=4.0, frames_indices=list(range(len(v)))) for v in videos]
    own = loaded[family](
        text=[rendered],
        images=[image],
        videos=[torch.from_numpy(v).permute(0, 3, 1, 2) for v in videos],
        video_metadata=metadata,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert sample.tokens.tolist() == own["input_ids"][0].tolist()
    supervised = loaded[family].tokenizer.decode(sample.tokens[sample.loss_mask == 1])
    assert supervised == "".join(answer + "<|im_end|>" for answer in answers)
    request = request_of(sample, processors[family])
    assert [tuple(grid) for grid in request.video_grids] == [tuple(g) for g in own["video_grid_thw"].tolist()]
    torch.testing.assert_close(request.video_values, own["pixel_values_videos"], rtol=0, atol=0)
    torch.testing.assert_close(request.pixel_values, own["pixel_values"], rtol=0, atol=1e-6)
    if family == "qwen2.5-vl":
        assert request.seconds_per_step == pytest.approx(np.asarray(own["second_per_grid_ts"]).tolist())
    is_pad = sample.tokens == loaded[family].video_token_id
    inside = np.zeros(len(is_pad), bool)
    for start, end in sample.video_spans:
        inside[start:end] = True
    assert inside[is_pad].all()
    assert len(sample.videos) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_file_is_sampled_as_the_processor_samples(family, loaded, processors, rng, tmp_path):
    (tmp_path / "v.mp4").write_bytes(video_helpers.encode(video_helpers.frames(rng, 31), 10))
    record = chat([{"type": "video_url", "video_url": {"url": "v.mp4"}}, text("Q")], "A")
    sample = make_sample(record, "x:1", tmp_path, processors[family], data_spec())
    metadata = VideoMetadata(total_num_frames=31, fps=10.0, duration=3.1)
    own = np.asarray(loaded[family].video_processor.sample_frames(metadata=metadata, fps=2.0)).tolist()
    assert sample.clips[0].indices == tuple(own)
    assert len(own) == 6  # 3.1 seconds at 2 frames a second
    assert sample.clips[0].grid[0] == 3
    faster = make_sample(chat([part("v.mp4", fps=5)], "A"), "x:1", tmp_path, processors[family], data_spec())
    assert len(faster.clips[0].indices) in (14, 15)
    assert faster.digest != sample.digest
    values, grids = render_videos(sample, processors[family])
    assert len(values) == np.prod(grids)
    assert media_files(record, "x:1", tmp_path) == (str(tmp_path / "v.mp4"),)


def test_limits_of_the_config(rng, tmp_path):
    (tmp_path / "v.mp4").write_bytes(video_helpers.encode(video_helpers.frames(rng, 31), 10))
    record = chat([part("v.mp4")], "A")

    def clip(**limits):
        data = data_spec(**limits)
        own = load_family("qwen3.5")
        processor = make_processor(own, {own.tokenizer.eos_token_id}, data=data)
        return make_sample(record, "x", tmp_path, processor, data).clips[0]

    def fingerprint(**limits):
        return make_processor(load_family("qwen3.5"), {1}, data=data_spec(**limits)).media_fingerprint()

    assert len(clip(video_fps=4.0).indices) == 12
    assert len(clip(video_fps=4.0, video_max_frames=5).indices) == 5
    small, large = clip(video_max_pixels=6 * 32 * 32), clip(video_min_pixels=60_000)
    assert (small.grid, large.grid) == ((3, 2, 2), (3, 6, 8))
    assert len({fingerprint(), fingerprint(video_fps=4.0), fingerprint(video_max_frames=5)}) == 3
    with pytest.raises(ValueError, match=r"data.video_min_pixels=1024 is not between 1 and data.video_max_pixels=9"):
        clip(video_max_pixels=9)


def test_every_input_form_gives_the_same_sample(processors, rng, tmp_path):
    encoded = video_helpers.encode(video_helpers.frames(rng, 8), 4)
    (tmp_path / "a v.mp4").write_bytes(encoded)
    forms = ["a v.mp4", str(tmp_path / "a v.mp4"), f"file://{tmp_path}/a%20v.mp4", mp4_url(encoded)]
    forms += [{"url": "a v.mp4"}, {"bytes": encoded, "path": None}]
    records = [chat([part(form), text("What?")], "That.") for form in forms]
    records.append(chat([{"type": "video_url", "video_url": {"url": forms[0]}}, text("What?")], "That."))
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "That."}]
    records.append({"conversations": turns, "videos": ["a v.mp4"]})
    records.append(chat("What?", "That.", video="a v.mp4"))
    records.append(chat([{"type": "video"}, text("What?")], "That.", videos=["a v.mp4"]))
    samples = [make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec()) for record in records]
    assert {sample.digest for sample in samples} == {samples[0].digest}
    other = chat([part(mp4_url(video_helpers.encode(video_helpers.frames(rng, 8), 4))), text("What?")], "That.")
    assert make_sample(other, "x:1", tmp_path, processors["qwen3.5"], data_spec()).digest != samples[0].digest


def test_markers_of_pictures_and_videos_in_one_conversation(processors, rng, tmp_path):
    image, encoded = picture(rng, 40, 40), video_helpers.encode(video_helpers.frames(rng, 6))
    turns = [{"from": "human", "value": "A <video> and <image>?"}, {"from": "gpt", "value": "Yes."}]
    beside = {"conversations": turns, "images": [data_url(image)], "videos": [mp4_url(encoded)]}
    inside = [text("A "), part(mp4_url(encoded)), text(" and "), {"type": "image", "image": data_url(image)}, text("?")]
    samples = [
        make_sample(r, "x", tmp_path, processors["qwen3.5"], data_spec()) for r in (beside, chat(inside, "Yes."))
    ]
    assert samples[0].digest == samples[1].digest
    plain = make_sample(chat("a <video> tag", "Yes."), "x", tmp_path, processors["qwen3.5"], data_spec())
    assert plain.videos == ()


def test_the_rate_of_listed_frames_is_part_of_the_digest(processors, rng, tmp_path):
    """Qwen2.5-VL's positions follow it, and its tokens do not."""
    frames = [data_url(picture(rng, 56, 56)) for _ in range(4)]
    records = [chat([part(frames, fps=fps), text("What?")], "That.") for fps in (1, 2)]
    slow, fast = (make_sample(r, "x:1", tmp_path, processors["qwen2.5-vl"], data_spec()) for r in records)
    assert slow.tokens.tolist() == fast.tokens.tolist()
    assert [sample.clips[0].seconds_per_step for sample in (slow, fast)] == [2.0, 1.0]
    assert slow.digest != fast.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_never_splits_a_video(family, processors, rng, tmp_path):
    encoded = mp4_url(video_helpers.encode(video_helpers.frames(rng, 12), 4))
    messages = [*chat("Q1", "A1.")["messages"], *chat([part(encoded), text("Q2")], "A2 is longer.")["messages"]]
    whole = make_sample({"messages": messages}, "x:1", tmp_path, processors[family], data_spec())
    ((start, end),) = whole.video_spans
    for max_length in range(start - 4, len(whole.tokens) + 1):
        data = data_spec(max_length=max_length)
        sample = make_sample({"messages": messages}, "x:1", tmp_path, processors[family], data)
        length = len(sample.tokens)
        assert length == (start if start < max_length < end else max_length)
        assert sample.tokens.tolist() == whole.tokens[:length].tolist()
        assert len(sample.videos) == len(sample.clips) == (length >= end)


def test_a_target_without_videos(rng, tmp_path):
    record = chat([part([data_url(picture(rng, 40, 40))] * 2)], "A")
    with pytest.raises(SampleError, match="the target takes none"):
        make_sample(record, "x:1", tmp_path, wrap(load_family("qwen3")), data_spec())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(20, 20), (31, 90), (400, 40), (9000, 40)])
def test_small_and_thin_videos(family, size, processors, rng, tmp_path):
    """Either kept with the grid that the pixels have, or refused in one sentence, as the installed rule has it."""
    record = chat([part([data_url(picture(rng, *size))] * 2)], "A")
    too_small = family != "qwen2.5-vl" and min(size) < 32
    if too_small or max(size) > 200 * min(size):
        with pytest.raises(MediaError, match=f"video of {size[0]}x{size[1]} pixels is refused by the video processor"):
            make_sample(record, "x:1", tmp_path, processors[family], data_spec())
    else:
        sample = make_sample(record, "x:1", tmp_path, processors[family], data_spec())
        assert render_videos(sample, processors[family])[1] == (sample.clips[0].grid,)


def test_late_failure_names_the_sample(processors, rng, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(video_helpers.encode(video_helpers.frames(rng, 6)))
    sample = make_sample(chat([part("v.mp4")], "A", id="s1"), "x:1", tmp_path, processors["qwen3.5"], data_spec())
    path.write_bytes(video_helpers.encode(video_helpers.frames(rng, 6, width=128)))
    with pytest.raises(MediaError, match="sample s1: videos have patch grids"):
        render_videos(sample, processors["qwen3.5"])
    path.write_bytes(b"gone")
    with pytest.raises(MediaError, match=r"sample s1: video .*v.mp4 cannot be read"):
        render_videos(sample, processors["qwen3.5"])


# --- the index --------------------------------------------------------------------------------------------------------


def test_index_of_a_file_with_videos(processors, rng, tmp_path, monkeypatch):
    (tmp_path / "v.mp4").write_bytes(video_helpers.encode(video_helpers.frames(rng, 6)))
    listed = part([data_url(picture(rng, 40, 40))] * 2)
    records = [chat("Q", "A"), chat([part("v.mp4")], "A", id="v"), chat([listed, listed], "A"), chat([part("no")], "A")]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    spec = data_spec(train_path=str(path), cache_dir=str(tmp_path / "cache"))

    def build():
        return build_indexes(TargetSpec(path="", layer_ids=(0,)), spec, processors["qwen3.5"])["train"]

    index = build()
    table = index.table()
    assert np.frombuffer(table.num_videos, np.uint8).tolist() == [0, 1, 2]
    assert (table.counts["videos"], table.counts["skipped: broken video"]) == (3, 1)
    assert index.sample(1).digest == index.entries[1].digest
    assert build().entries == index.entries
    with monkeypatch.context() as patch:  # the cache knows that there was a decoder
        patch.setattr(video, "decoder", lambda: "")
        assert build().table().counts["skipped: no video decoder"] == 1
    (tmp_path / "v.mp4").write_bytes(video_helpers.encode(video_helpers.frames(rng, 6)))
    with pytest.raises(MediaError, match="sample v .* has changed"):
        index.sample(1)
    assert build().entries[1].digest != index.entries[1].digest


def _image(frame):
    from PIL import Image

    return Image.fromarray(frame)


def _kinds(content):
    return content if isinstance(content, str) else [p if p["type"] == "text" else {"type": p["type"]} for p in content]

"""Pictures as people give them: paths, URLs and bytes, each read right or refused in one short sentence."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from sample_helpers import chat, data_spec, load_family, picture, png, wrap, write_jsonl

from feature_bridge import media, media_parts, samples
from feature_bridge import readers as readers_module
from feature_bridge.contracts import TargetSpec
from feature_bridge.index import build_indexes
from feature_bridge.media import MediaError
from feature_bridge.processors import Processor
from feature_bridge.scan import scan_row
from feature_bridge.sources import open_source
from feature_bridge.video import Clip


@pytest.fixture(scope="module")
def processor() -> Processor:
    return wrap(load_family("qwen3.5"))


@pytest.fixture
def rng():
    return np.random.default_rng()


# --- paths and URLs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ha#sh.png", "what?.png", "[2024] trip.png", "a b%41.png"])
def test_file_url_names_the_file_it_spells(name, tmp_path):
    """Quoted as the standard wants it, and with the special characters as people leave them."""
    (tmp_path / name).write_bytes(name.encode())
    quoted = name.replace("%", "%25")
    for url in (f"file://{tmp_path}/{quoted}", f"FILE://localhost{tmp_path}/{quoted}", f"file:{quoted}"):
        assert media.read(media.resolve(url, tmp_path)) == name.encode()


@pytest.mark.parametrize("url", ["file://[2024] trip/a.jpg", "file://ok.png", "file://[::1"])
def test_file_url_of_another_host_is_refused(url, tmp_path):
    with pytest.raises(MediaError, match=r"is on the host '[^/]*' by its URL; write file:///absolute/path, or"):
        media.resolve(url, tmp_path)


@pytest.mark.parametrize("url", ["http://x/y.png", "HTTPS://x/y.png", "s3://x/y.png", "gs://x/y.png", "hf://x/y.png"])
def test_remote_pictures_are_named_so(url, tmp_path):
    with pytest.raises(MediaError, match="is remote; download it and give its path"):
        media.resolve(url, tmp_path)


def test_data_urls_as_people_write_them(rng, tmp_path):
    """Any case, line breaks, the alphabet of URLs, no padding, quoted."""
    encoded = rng.integers(0, 256, 1000, np.uint8).tobytes()  # 1000 bytes are padded with two "="
    body = base64.b64encode(encoded).decode()
    safe = base64.urlsafe_b64encode(encoded).decode()
    lines = "\r\n".join(body[i : i + 76] for i in range(0, len(body), 76))
    bodies = [body, lines, safe, safe.rstrip("="), body.replace("+", "%2B").replace("=", "%3D")]
    for url in [f"data:image/png;base64,{b}" for b in bodies] + [f"DATA:image/png;charset=utf-8;BASE64,{body}"]:
        assert media.read(media.resolve(url, tmp_path)) == encoded
    for bad in ("data:image/png;base64", "data:;base64,@@@@", "data:;base64,abcde"):
        with pytest.raises(MediaError, match="data URL does not decode"):
            media.read(media.resolve(bad, tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_data_url_says_the_pictures_type(kind, rng):
    file = io.BytesIO()
    picture(rng, 20, 20).save(file, kind)
    assert media_parts.data_url(file.getvalue()).startswith(
        f"data:image/{ {'MPO': 'jpeg'}.get(kind, kind.lower()) };base64,"
    )
    with pytest.raises(MediaError, match="is not an image file"):
        media_parts.data_url(b"RIFF but no picture")


# --- one sample never stops the others --------------------------------------------------------------------------------


def test_what_nobody_foresaw_costs_one_sample(processor, tmp_path, monkeypatch):
    """In the index it is a skip of its own kind; while training, a fault. A machine out of memory is no such thing."""
    records = [chat("Q", "A good answer.", id=name) for name in ("a", "bad", "c")]
    spec = data_spec(train_path=str(write_jsonl(tmp_path / "t.jsonl", records)))
    target, make_sample, error = TargetSpec(path="", layer_ids=(0,)), samples.make_sample, KeyError("what " * 999)

    def failing(record, *arguments, **options):
        if record["id"] == "bad":
            raise error
        return make_sample(record, *arguments, **options)

    whole = build_indexes(target, spec, processor)["train"]
    monkeypatch.setattr(samples, "make_sample", failing)
    index = build_indexes(target, spec, processor)["train"]
    assert [entry.sample_id for entry in index.entries] == ["a", "c"]
    assert index.counts["skipped: unexpected error"] == 1
    assert index.skipped[0].where == "t.jsonl:2"
    found = [readers_module.load(whole, position) for position in range(3)]
    assert [fault is None for _, _, fault in found] == [True, False, True]
    for reason in (index.skipped[0].reason, found[1][2]):
        assert "unexpected error, please report it: KeyError in test_media.py:" in reason
        assert len(reason) < 400
    error = MemoryError("no more")
    for read in (lambda: build_indexes(target, spec, processor), lambda: readers_module.load(whole, 1)):
        with pytest.raises(MemoryError):
            read()


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-vl", "qwen2.5-vl"])
def test_extreme_fps_is_refused_or_sampled(family):
    rules = wrap(load_family(family)).videos
    clip = Clip(40, 10.0, 48, 64)
    for fps in (1e308, 1e12, 1e-12, 1e-300):
        try:
            assert set(rules.sample(clip, fps)) <= set(range(40))
        except MediaError as error:
            assert f"video of 40 frames cannot be sampled at fps={fps:g}" in str(error)  # noqa: PT017


# --- what is no path --------------------------------------------------------------------------------------------------


def test_base64_in_place_of_a_path_is_named_in_one_short_sentence(processor, rng, tmp_path):
    """Neither the reason nor what the index keeps of the record's files has the megabytes."""
    bare = base64.b64encode(png(picture(rng, 300, 300))).decode()
    values = {
        bare: "looks like base64; write it as data:image/",
        bare[:300]: "looks like base64; write it as data:image/",
    }
    values |= {"no path. " * 1000: "is a text of 9000 characters", "x." * 200: "cannot be read: File name too long"}
    source = open_source(str(write_jsonl(tmp_path / "t.jsonl", [chat("Q", "A", images=[v]) for v in values])), "f")
    for row, reason in enumerate(values.values()):
        entry = scan_row(source, row, processor, data_spec())
        assert (reason in entry.reason, entry.kind) == (True, "broken picture")
        assert len(entry.reason) <= 300
        assert sum(len(file[0]) for file in entry.files) < 1000
    name = "a" * 200  # a file is what it is called
    (tmp_path / name).write_bytes(b"x")
    assert media.read(media.resolve(name, tmp_path)) == b"x"


# --- orientation and depth --------------------------------------------------------------------------------------------

FORMATS = {
    "PNG": ("L", "RGB", "RGBA", "P", "I;16", "1"),
    "TIFF": ("L", "RGB", "RGBA", "P", "I;16", "1", "CMYK"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
_TURNS = {1: "", 2: "h", 3: "rr", 4: "v", 5: "hr", 6: "rrr", 7: "hrrr", 8: "r"}  # flips and quarters to the left


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in FORMATS.items() for mode in modes])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_upright_and_its_header_knows(kind, mode, orientation):
    """Black but for its upper left quarter, which each orientation moves elsewhere."""
    grey = np.zeros((32, 64), np.uint16)
    grey[:16, :32] = 65535
    stored = Image.fromarray(grey if mode == "I;16" else (grey >> 8).astype(np.uint8)).convert(mode)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, kind, exif=exif)
    decoded = np.asarray(media.decode(file.getvalue(), "p"))
    assert media.size(file.getvalue(), "p") == decoded.shape[:2]
    expected = (grey >> 8).astype(int)
    for step in _TURNS[orientation]:
        expected = {"h": np.fliplr, "v": np.flipud, "r": np.rot90}[step](expected)
    assert decoded.shape[:2] == expected.shape
    assert np.abs(decoded[..., 0] - expected).mean() < 20  # compression


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_there_is_not_turns_nothing(orientation, rng):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture(rng, 30, 20).save(file, "PNG", exif=exif)
    assert media.size(file.getvalue(), "p") == (20, 30)
    assert media.decode(file.getvalue(), "p").size == (30, 20)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 12, dtype=np.float32), "its values are floating-point numbers"),
        (np.linspace(0, 255, 12, dtype=np.int32), "its 32-bit values, 0 to 255, are not those of 16 bits"),
        (np.linspace(0, 65536, 12, dtype=np.int32), "its 32-bit values, 0 to 65536, are not"),
        (np.linspace(-1, 65535, 12, dtype=np.int32), "its 32-bit values, -1 to 65535, are not"),
    ],
)
def test_values_of_an_unknown_range_are_refused(values, reason, tmp_path):
    Image.fromarray(values.reshape(3, 4)).save(tmp_path / "p.tiff")
    with pytest.raises(MediaError, match=f"picture p does not decode: {reason}.*; save it with 8 bits a channel"):
        media.decode((tmp_path / "p.tiff").read_bytes(), "p")


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, ">u2"])
def test_sixteen_bits_are_scaled_in_every_container(dtype, tmp_path):
    values = np.array([[0, 255, 256, 65535]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / "p.tiff")
    decoded = np.asarray(media.decode((tmp_path / "p.tiff").read_bytes(), "p"))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 255]

"""Samples against an independent route: the processor's own expansion, and the answers encoded by themselves."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from sample_helpers import TINY_TARGET, chat, data_spec, data_url, load_family, picture, png, wrap

from feature_bridge import media
from feature_bridge.media import MediaError, SampleError
from feature_bridge.processors import load_processor, make_processor
from feature_bridge.samples import make_sample, render_inputs

FAMILIES = ("qwen3.5", "qwen3-vl", "qwen2.5-vl")


@pytest.fixture(scope="module")
def loaded():
    return {family: load_family(family) for family in (*FAMILIES, "qwen3")}


@pytest.fixture(scope="module")
def processors(loaded):
    return {family: wrap(processor) for family, processor in loaded.items()}


@pytest.fixture
def rng():
    return np.random.default_rng()


def tokenizer_of(loaded):
    return getattr(loaded, "tokenizer", loaded)


def supervised(sample):
    return sample.tokens[sample.loss_mask == 1].tolist()


def encode_answers(tokenizer, answers):
    return [token for answer in answers for token in tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)]


def hf_messages(turns):
    """Turns (role, pieces) in the form transformers documents, with pictures inside."""
    part = lambda piece: {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"}
    return [
        {"role": role, "content": pieces if isinstance(pieces, str) else [part(piece) for piece in pieces]}
        for role, pieces in turns
    ]


def openai_record(turns):
    def part(piece):
        if isinstance(piece, str):
            return {"type": "text", "text": piece}
        return {"type": "image_url", "image_url": {"url": data_url(piece)}}

    return {
        "messages": [
            {"role": role, "content": pieces if isinstance(pieces, str) else [part(piece) for piece in pieces]}
            for role, pieces in turns
        ]
    }


def own_ids(loaded, turns, **options):
    """The family's own ids of a conversation, placeholders expanded."""
    text = loaded.apply_chat_template(hf_messages(turns), tokenize=False, enable_thinking=False, **options)
    images = [
        piece for _, pieces in turns if not isinstance(pieces, str) for piece in pieces if not isinstance(piece, str)
    ]
    if not images:
        return tokenizer_of(loaded)(text, add_special_tokens=False)["input_ids"]
    return np.asarray(loaded(text=[text], images=images)["input_ids"][0]).tolist()


# --- tokens and mask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_image_conversation_equals_the_processors_own(family, loaded, processors, rng, tmp_path):
    first = picture(rng, *rng.integers(20, 200, 2))
    second = picture(rng, *rng.integers(20, 200, 2))
    third = picture(rng, 333, 47)
    answers = ["Two pictures, <b>one</b> of a dog.", '{"name": "Zürich", "n": [1, 2]}\n\nyes 🐕', "No."]
    turns = [
        ("system", "Be brief."),
        ("user", [first, "What is this, and ", second, "?"]),
        ("assistant", answers[0]),
        ("user", "As JSON."),
        ("assistant", answers[1]),
        ("user", ["And this?", third]),
        ("assistant", answers[2]),
    ]
    sample = make_sample(openai_record(turns), "x:1", tmp_path, processors[family], data_spec())

    assert sample.tokens.tolist() == own_ids(loaded[family], turns)
    assert supervised(sample) == encode_answers(loaded[family].tokenizer, answers)
    start, end = sample.last_answer
    assert sample.tokens[:start].tolist() == own_ids(loaded[family], turns[:-1], add_generation_prompt=True)
    assert sample.tokens[start:end].tolist() == encode_answers(loaded[family].tokenizer, answers[-1:])
    assert (sample.tokens.dtype, sample.loss_mask.dtype) == (np.int32, np.uint8)

    is_pad = sample.tokens == loaded[family].image_token_id
    in_span = np.zeros(len(is_pad), bool)
    for (begin, stop), (t, h, w) in zip(sample.image_spans, sample.image_grids, strict=True):
        assert stop - begin == t * h * w // 4
        in_span[begin:stop] = True
    assert np.array_equal(is_pad, in_span)

    pixels, grids = render_inputs(sample, processors[family])
    reference = loaded[family].image_processor(images=[first, second, third], return_tensors="np")
    assert grids == tuple(map(tuple, reference["image_grid_thw"].tolist()))
    np.testing.assert_array_equal(pixels, reference["pixel_values"])
    assert pixels.dtype == np.float32


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_text_conversation(family, loaded, processors, tmp_path):
    answers = ["The first.", "<think is not a tag here", "  < last"]
    turns = [("user", "One?"), ("assistant", answers[0]), ("user", "Two?"), ("assistant", answers[1])]
    turns += [("user", "<image> is plain text here"), ("assistant", answers[2])]
    sample = make_sample(openai_record(turns), "x:1", tmp_path, processors[family], data_spec())
    assert sample.tokens.tolist() == own_ids(loaded[family], turns)
    rendered = [answer.strip() if family in ("qwen3.5", "qwen3-vl") else answer for answer in answers]
    assert supervised(sample) == encode_answers(tokenizer_of(loaded[family]), rendered)
    assert render_inputs(sample, processors[family]) == (None, ())
    start, _ = sample.last_answer
    assert sample.tokens[:start].tolist() == own_ids(loaded[family], turns[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3"])
def test_thoughts_after_the_stub_are_supervised(family, loaded, processors, tmp_path):
    thought = "<think>\nHmm.\n</think>\n\n"
    turns = [("user", "One?"), ("assistant", thought + "A."), ("user", "Two?"), ("assistant", thought + "B.")]
    sample = make_sample(openai_record(turns), "x:1", tmp_path, processors[family], data_spec())
    # The history has lost its thought; the last turn starts after the part of the stub that it shares.
    assert supervised(sample) == encode_answers(tokenizer_of(loaded[family]), ["A.", "Hmm.\n</think>\n\nB."])


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3"])
def test_an_answer_may_bring_the_prompts_empty_stub(family, processors, tmp_path):
    records = [chat("Q", "A."), chat("Q", "<think>\n\n</think>\n\nA.")]
    samples = [make_sample(record, "x:1", tmp_path, processors[family], data_spec()) for record in records]
    assert samples[0].digest == samples[1].digest


def test_thoughts_are_text_where_the_template_knows_none(loaded, processors, tmp_path):
    answers = ["<think>\nHmm.\n</think>\n\nA.", "<think>\nAha.\n</think>\n\nB."]
    turns = [("user", "One?"), ("assistant", answers[0]), ("user", "Two?"), ("assistant", answers[1])]
    sample = make_sample(openai_record(turns), "x:1", tmp_path, processors["qwen3-vl"], data_spec())
    assert supervised(sample) == encode_answers(loaded["qwen3-vl"].tokenizer, answers)


def test_messages_after_the_last_answer_are_dropped(processors, tmp_path):
    record = chat("One?", "The answer.")
    longer = {"messages": [*record["messages"], {"role": "user", "content": "Unanswered?"}]}
    samples = [make_sample(r, "x:1", tmp_path, processors["qwen3.5"], data_spec()) for r in (record, longer)]
    assert samples[0].digest == samples[1].digest


def test_a_token_across_the_prompts_end_is_not_supervised(loaded, processors, tmp_path):
    answer = "\n\nText after newlines."
    sample = make_sample(chat("x", answer), "x:1", tmp_path, processors["qwen2.5-vl"], data_spec())
    text = loaded["qwen2.5-vl"].tokenizer.decode(supervised(sample))
    assert text.lstrip("\n") == "Text after newlines.<|im_end|>"
    prompt = own_ids(loaded["qwen2.5-vl"], [("user", "x")], add_generation_prompt=True)
    assert sample.tokens[: len(prompt) - 1].tolist() == prompt[:-1]


def test_template_that_loses_answers_is_refused(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    template += "{% if loop.last %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    tokenizer = load_family("qwen3")
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    record = {"messages": [*chat("One?", "A.")["messages"], *chat("Two?", "B.")["messages"]]}
    with pytest.raises(SampleError, match="rewrites turn 1"):
        make_sample(record, "x:1", tmp_path, wrap(tokenizer), data_spec())


def test_template_without_end_of_turn_token_is_refused(processors, tmp_path):
    other_eos = dataclasses.replace(processors["qwen3"], eos_token_ids=frozenset({3}))
    with pytest.raises(SampleError, match="no end-of-turn token"):
        make_sample(chat("Hi", "Hello"), "x:1", tmp_path, other_eos, data_spec())


# --- input forms ------------------------------------------------------------------------------------------------------


def test_every_input_form_gives_the_same_sample(processors, rng, tmp_path):
    image = picture(rng, 50, 40)
    path = tmp_path / "sub" / "a picture.png"
    path.parent.mkdir()
    path.write_bytes(png(image))
    url = "file://" + str(path).replace(" ", "%20")
    text = {"type": "text", "text": "What?"}
    openai = [
        [{"type": "image_url", "image_url": {"url": data_url(image)}}, text],
        [{"type": "image_url", "image_url": url}, text],
        [{"type": "image", "image": "sub/a picture.png"}, text],
        [{"type": "image", "image": str(path)}, {"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}],
        [
            {"type": "image", "image": {"bytes": png(image), "path": None}},
            {"type": "text", "text": "What?", "image": None},
        ],
    ]
    records = [chat(content, "That.") for content in openai]
    for question in ("What?", "<image>What?"):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "That."}]
        records.append({"conversations": turns, "images": ["sub/a picture.png"]})
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "That."}]
        records.append({"conversations": turns, "image": str(path)})
    records.append(chat("What?", "That.", images=[url]))
    records.append(chat([{"type": "image"}, text], "That.", images=[None, url]))
    samples = [make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec()) for record in records]
    assert {sample.digest for sample in samples} == {samples[0].digest}
    assert len(samples[0].images) == 1


def test_pictures_beside_the_conversation_go_to_the_first_user_turn(loaded, processors, rng, tmp_path):
    images = [picture(rng, 40, 40), picture(rng, 90, 40)]
    turns = [{"from": "system", "value": "S."}, {"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}]
    record = {"conversations": [*turns, {"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}]}
    same = [("system", "S."), ("user", [*images, "Q1"]), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    sample = make_sample(
        record | {"images": [data_url(i) for i in images]}, "x:1", tmp_path, processors["qwen3.5"], data_spec()
    )
    assert sample.tokens.tolist() == own_ids(loaded["qwen3.5"], same)


def test_markers_place_the_pictures(loaded, processors, rng, tmp_path):
    images = [picture(rng, 40, 40), picture(rng, 90, 40)]
    turns = [("human", "Q1 <image> and"), ("gpt", "A1 <image>"), ("human", "<image>Q2"), ("gpt", "A2")]
    record = {"conversations": [{"from": name, "value": value} for name, value in turns]}
    same = [
        ("user", ["Q1 ", images[0], " and"]),
        ("assistant", "A1 <image>"),
        ("user", [images[1], "Q2"]),
        ("assistant", "A2"),
    ]
    sample = make_sample(
        record | {"images": [data_url(i) for i in images]}, "x:1", tmp_path, processors["qwen3.5"], data_spec()
    )
    assert sample.tokens.tolist() == own_ids(loaded["qwen3.5"], same)


@pytest.mark.parametrize("none", [{"image": None}, {"images": None}, {"images": []}, {"images": [None]}, {}])
def test_no_picture_is_a_text_sample(none, processors, tmp_path):
    sample = make_sample(chat("Hi", "Hello", **none), "x:1", tmp_path, processors["qwen3.5"], data_spec())
    assert sample.images == ()


def test_sample_id_and_digest(processors, rng, tmp_path):
    def make(record):
        return make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec())

    assert make(chat("Hi", "Hello", id=7)).sample_id == "7"
    assert make(chat("Hi", "Hello")).sample_id == "x:1"
    assert make(chat("Hi", "Hello", id="a")).digest == make(chat("Hi", "Hello", id="b")).digest
    one, other = (chat("Hi", "Hello", images=[data_url(picture(rng, 40, 40))]) for _ in range(2))
    assert make(one).tokens.tolist() == make(other).tokens.tolist()
    assert make(one).digest != make(other).digest


# --- length -----------------------------------------------------------------------------------------------------------


def test_truncation_never_splits_a_picture(processors, rng, tmp_path):
    images = [picture(rng, 64, 64), picture(rng, 100, 64)]
    turns = [
        ("user", [images[0], "Q1"]),
        ("assistant", "A1."),
        ("user", [images[1], "Q2"]),
        ("assistant", "A2 is longer."),
    ]
    processor, record = processors["qwen3.5"], openai_record(turns)
    whole = make_sample(record, "x:1", tmp_path, processor, data_spec())
    (_, _), (start, end) = whole.image_spans
    for max_length in range(start - 8, len(whole.tokens) + 1):
        sample = make_sample(record, "x:1", tmp_path, processor, data_spec(max_length=max_length))
        length = len(sample.tokens)
        assert length == (start - 1 if start - 1 < max_length < end else max_length)  # start - 1: <|vision_start|>
        assert sample.tokens.tolist() == whole.tokens[:length].tolist()
        assert sample.loss_mask.tolist() == whole.loss_mask[:length].tolist()
        assert sample.truncated == (length < len(whole.tokens))
        assert len(sample.images) == len(sample.image_grids) == len(sample.image_spans) == (2 if length >= end else 1)
        assert len(render_inputs(sample, processor)[0]) == sum(4 * (stop - begin) for begin, stop in sample.image_spans)


def test_too_long_can_be_dropped(processors, tmp_path):
    data = data_spec(max_length=8, too_long="drop")
    with pytest.raises(SampleError, match=r"\d+ tokens, more than data.row_tokens=8"):
        make_sample(chat("Hi", "Hello"), "x:1", tmp_path, processors["qwen3.5"], data)


def test_too_few_supervised_tokens(loaded, processors, tmp_path):
    count = len(encode_answers(loaded["qwen3.5"].tokenizer, ["Hello there"]))
    record = chat("Hi", "Hello there")
    make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec(min_supervised=count))
    with pytest.raises(SampleError, match=f"{count} supervised tokens, fewer than {count + 1} \\(2 x"):
        make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec(min_supervised=count + 1))
    with pytest.raises(SampleError, match="supervised tokens of its first"):  # truncation left nothing to learn
        make_sample(record, "x:1", tmp_path, processors["qwen3.5"], data_spec(max_length=6))


def test_a_sample_without_an_anchor_is_left_out(processors, tmp_path):
    """Enough supervised tokens, and yet none that follows another: each empty answer is its end of turn alone."""
    turns = [("user", "Q"), ("assistant", "")] * 9
    with pytest.raises(SampleError, match="no supervised token follows another"):
        make_sample(openai_record(turns), "x:1", tmp_path, processors["qwen2.5-vl"], data_spec(min_supervised=8))
    turns[-1] = ("assistant", "A")
    sample = make_sample(openai_record(turns), "x:1", tmp_path, processors["qwen2.5-vl"], data_spec(min_supervised=8))
    assert sample.num_supervised == 10


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"), [("TIFF", "CMYK"), ("JPEG", "CMYK"), ("GIF", "P"), ("PNG", "LA"), ("PNG", "RGBA")]
)
def test_modes_become_rgb(kind, mode, rng, tmp_path):
    path = tmp_path / "picture"
    image = picture(rng, 30, 20).convert(mode)
    image.save(path, kind)
    decoded = media.decode(path.read_bytes(), "p")
    assert (decoded.mode, decoded.size) == ("RGB", (30, 20))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    decoded = np.asarray(media.decode((tmp_path / "deep.png").read_bytes(), "p"))
    assert decoded[0].tolist() == [[value >> 8] * 3 for value in (0, 256, 32768, 65535)]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    decoded = media.decode((tmp_path / "moving.gif").read_bytes(), "p")
    assert decoded.getpixel((3, 3)) == (255, 0, 0)


def test_orientation_is_applied_and_known_from_the_header(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(rng, 60, 20).save(tmp_path / "turned.jpg", exif=exif)
    encoded = (tmp_path / "turned.jpg").read_bytes()
    assert media.decode(encoded, "p").size == (20, 60)
    assert media.size(encoded, "p") == (60, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (199, 1), (2, 300)])
def test_tiny_pictures_keep_their_grid(size, loaded, processors, rng, tmp_path):
    image = picture(rng, *size)
    sample = make_sample(chat("Q", "A", images=[data_url(image)]), "x:1", tmp_path, processors["qwen3.5"], data_spec())
    pixels, _ = render_inputs(sample, processors["qwen3.5"])
    assert len(pixels) == np.prod(sample.image_grids)
    assert np.prod(sample.image_grids) == loaded["qwen3.5"].image_processor.get_number_of_image_patches(*size[::-1], {})


def test_late_failure_names_the_sample(processors, rng, tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(png(picture(rng, 64, 64)))
    sample = make_sample(chat("Q", "A", images=["p.png"], id="s1"), "x:1", tmp_path, processors["qwen3.5"], data_spec())
    path.write_bytes(png(picture(rng, 200, 64)))
    with pytest.raises(MediaError, match="sample s1: pictures have patch grids"):
        render_inputs(sample, processors["qwen3.5"])
    path.unlink()
    with pytest.raises(MediaError, match=r"sample s1: .*p.png does not exist"):
        render_inputs(sample, processors["qwen3.5"])


# --- processors -------------------------------------------------------------------------------------------------------


def test_pixel_limits_change_the_grid(rng, tmp_path):
    record = chat("Q", "A", images=[data_url(picture(rng, 100, 100))])
    target = str(load_family("qwen3.5").tokenizer.name_or_path)
    grids = []
    for limits in ({}, {"max_pixels": 64 * 64}, {"min_pixels": 160 * 160, "max_pixels": 200 * 200}):
        sample = make_sample(record, "x:1", tmp_path, load_processor(target, data=data_spec(**limits)), data_spec())
        grids.append(sample.image_grids[0])
    assert grids == [(1, 6, 6), (1, 4, 4), (1, 10, 10)]
    with pytest.raises(ValueError, match="data.min_pixels=100000 is not between 1 and data.max_pixels"):
        load_processor(target, data=data_spec(min_pixels=100000))


def test_text_only_target_by_path(loaded, processors, tmp_path):
    loaded["qwen3"].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "eos_token_id": [1216, 1217]}')
    processor = load_processor(str(tmp_path))
    assert (processor.image_processor, processor.eos_token_ids) == (None, frozenset({1216, 1217}))
    samples = [make_sample(chat("Q", "A"), "x:1", tmp_path, p, data_spec()) for p in (processor, processors["qwen3"])]
    assert samples[0].digest == samples[1].digest


def test_target_without_chat_template():
    tokenizer = load_family("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; add"):
        make_processor(tokenizer, {1})


def test_missing_target(tmp_path):
    with pytest.raises(ValueError, match=r"target.path='.*nothing' is not a folder here; give one, or a hub id"):
        load_processor(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"target.path='.*' holds no processor or tokenizer that loads"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tokenizer.json", "has no tokenizer.json; add the tokenizer's files"),
        (
            "preprocessor_config.json",
            "has a vision_config and no preprocessor_config.json, by which pictures are resized",
        ),
    ],
)
def test_a_missing_file_of_a_target_is_named(file, said, tmp_path):
    """Else transformers makes a tokenizer without words, or no image processor, and every record is at fault."""
    for path in TINY_TARGET.iterdir():
        if path.name != file and path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=rf"target.path='.*' {said}"):
        load_processor(str(tmp_path))

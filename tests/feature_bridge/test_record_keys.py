"""Keys of records, turns and parts: used, known to change nothing, or a reason to skip the record that is named."""

import pytest
from PIL import Image
from sample_helpers import chat, data_spec, data_url, load_family, png, wrap

from feature_bridge import record_keys
from feature_bridge.answers import Answer, rewritten
from feature_bridge.conversations import parse, with_answer
from feature_bridge.media import SampleError
from feature_bridge.samples import make_sample


@pytest.fixture(scope="module")
def processor():
    return wrap(load_family("qwen3.5"))


@pytest.fixture
def make(processor, tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(Image.new("RGB", (40, 40), colour)))
    return lambda record: make_sample(record, "x:1", tmp_path, processor, data_spec())


def two_answers(first=None, second=None, **more):
    """Two questions with their answers, and further fields of the answers and of the record."""
    answers = ({"role": "assistant", "content": "A banana boat."}, {"role": "assistant", "content": "An apple."})
    return {
        "messages": [
            {"role": "user", "content": "Name a fruit."},
            answers[0] | (first or {}),
            {"role": "user", "content": "Again."},
            answers[1] | (second or {}),
        ]
    } | more


# --- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        *(two_answers({key: no}) for key in record_keys.LOSS_KEYS for no in (0, 0.0, False)),
        two_answers({"loss": False, "weight": 0}, {"loss": True, "weight": 1}),
        *(two_answers(**{key: [0, 1]}) for key in record_keys.LOSS_KEYS),
        two_answers(loss_mask=[0, 0, 0, 1]),
        two_answers(loss_mask=[None, False, None, True], train=True),
        two_answers({"weight": 0}, loss_mask=[0, 1]),
        {
            "conversations": [
                {"from": "human", "value": "Name a fruit."},
                {"from": "gpt", "value": "A banana boat.", "train": False},
                {"from": "human", "value": "Again.", "weight": 0},
                {"from": "gpt", "value": "An apple.", "train": None},
            ]
        },
    ],
)
def test_an_answer_that_is_not_to_be_learnt_is_context(record, make):
    sample = make(record)
    assert sample.digest == make(two_answers({"weight": 0})).digest
    assert sample.num_supervised == 5
    assert make(two_answers()).num_supervised == 15


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (two_answers({"loss": 0.3}), "turn 1 has loss=0.3, which is not read; give 0 or 1"),
        (two_answers({"loss_mask": [0, 0, 1]}), r"turn 1 has loss_mask=\[0, 0, 1\], which is not read"),
        (two_answers({"train": "no"}), "turn 1 has train='no'"),
        (two_answers({"loss": True, "weight": 0}), "turn 1 has weight and loss, which contradict each other"),
        (two_answers({"weight": 1}, loss_mask=[0, 1]), "turn 1 is to be learnt by itself or by the record"),
        (two_answers(loss_mask=[0, 1, 1]), "loss_mask of 3 values for 4 turns and 2 answers; give one for each"),
        (two_answers(loss_mask=[1, 1, 1, 1]), "turn 0 has loss_mask in a user turn, and only answers are learnt"),
        (two_answers(loss_mask=[0, 1], train=[1, 1]), "turn 1 has train and another of weight, loss"),
        (two_answers(weight=0.5), "the record has weight=0.5, which is not read; give 0 or 1 in its turns"),
        (two_answers(loss=0), "the record has loss=0, which is not read"),
    ],
)
def test_what_is_to_be_learnt_must_be_clear(record, reason, make):
    with pytest.raises(SampleError, match=reason):
        make(record)


def test_a_list_beside_a_system_prompt_is_still_of_the_turns(make):
    beside = make(two_answers(system="Be brief.", loss_mask=[0, 0, 0, 1]))
    assert beside.digest == make(two_answers({"loss": 0}, system="Be brief.")).digest


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thoughts",
    [
        *({key: "Two and two make four."} for key in record_keys.THOUGHT_KEYS[:-1]),
        {"reasoning_details": [{"type": "reasoning.text", "text": "Two and two"}, {"text": " make four."}]},
        {"reasoning": "Two and two make four.", "reasoning_details": [{"summary": "Two and two make four."}]},
        {"thinking": "Two and two make four.", "reasoning_content": "", "thought": None},
    ],
)
def test_thoughts_are_one_thing_under_every_name(thoughts, make, tmp_path):
    record = {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 it is."} | thoughts]
    }
    assert make(record).num_supervised == 17
    assert parse(record, "x", tmp_path).messages[1]["reasoning_content"] == "Two and two make four."


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"thinking": "a", "reasoning": "b"}, "turn 1 has reasoning and thinking, which differ; give one of them"),
        ({"thinking": True}, "turn 1 has thinking of type bool"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "has reasoning_details of type list"),
    ],
)
def test_thoughts_that_cannot_be_read_are_refused(turn, reason, make):
    with pytest.raises(SampleError, match=reason):
        make(two_answers(turn))
    asked = two_answers()
    asked["messages"][0]["thought"] = "hm"
    with pytest.raises(SampleError, match="turn 0 has thought in a user turn"):
        make(asked)


# --- keys that are not read -------------------------------------------------------------------------------------------

PART = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (two_answers({"channel": "final"}), "turn 1 has channel, which is not read; take it out"),
        (two_answers({"images": ["a.png"]}), "turn 1 has images, which is not read"),
        (two_answers({"mask": False}), "turn 1 has mask, which is not read"),
        *(
            (chat([PART | {key: 64}], "A"), f"turn 0 has a picture with {key}, .*; set data.{{min,max}}_pixels")
            for key in ("max_pixels", "min_pixels", "resized_height", "resized_width", "crop")
        ),
        (chat([{"type": "image_url", "image_url": {"url": "a.png", "max_pixels": 9}}], "A"), "picture with max_pixels"),
        (chat([{"type": "text", "text": "Q", "image": "a.png"}], "A"), "turn 0 has a text with image"),
        (chat([{"type": "video", "video": "a.mp4", "resized_height": 9}], "A"), "video with resized_h"),
        (chat([{"type": "video", "video": "a.mp4", "fps": 1, "sample_fps": 2}], "A"), "fps and sample_fps, which"),
        (chat("Q", "A", images=[{"path": "a.png", "resized_width": 9}]), "the record has images with resized_width"),
        *(
            (chat("Q", "A", **{key: value}), f"the record has {key}, which looks like media and is not read; name")
            for key, value in {
                "imgs": ["a.png"], "image_path": "deep/a.JPG", "picture": {"bytes": b"x", "path": None},
                "clip": "a.mp4", "raw": png(Image.new("RGB", (4, 4))),
                "photo": data_url(Image.new("RGB", (4, 4))), "shots": [[{"url": "https://host/a.webp?x=1"}]],
            }.items()
        ),
        *((chat(q, "A", imgs=["a.png"]), "the record has imgs, which") for q in ("<image>Q", [{"type": "image"}])),
        ({"conversations": [{"from": "human", "value": "<image>Q"}], "imgs": ["a.png"]}, "the record has imgs, which"),
        (chat("Q", "A", label_mask=[0, 0, 1]), "label_mask, which looks like masks or weights"),
        (chat("Q", "A", history=[{"role": "user", "content": "x"}]), "history, which looks like messages"),
        (chat("Q", "A", apis=[{"type": "function", "function": {"name": "f"}}]), "apis, which looks like tools"),
        (chat("Q", "A", enable_thinking=True), "the record has enable_thinking, which changes the prompt"),
        (chat("Q", "A", conversations=chat("Q", "B")["messages"]), "messages and conversations, which differ"),
        ({"messages": [{"role": "user", "content": "Q", "value": "P"}]}, "turn 0 has content and value, which differ"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_read_is_named(record, reason, make):
    with pytest.raises(SampleError, match=reason) as caught:
        make(record)
    assert caught.value.kind == record_keys.UNREAD


def test_fields_that_change_nothing(make):
    plain = make(two_answers())
    record = two_answers({"model": "m", "score": 0.5, "name": "x", "mask": None, "extra": []}, source="s", split="t",
                         shelf=3, note="a picture of a.png, say", keep=False, words=["a", "b"], image_size=[4, 4],
                         picture="", chat_template_kwargs={"enable_thinking": False})  # fmt: skip
    sample = make(record | {"conversations": record["messages"]})
    assert sample.digest == plain.digest
    assert sample.ignored == ("shelf", "note", "keep", "words")
    part = PART | {"detail": "auto", "max_pixels": None, "text": ""}
    assert make(chat([part], "A")).digest == make(chat([PART], "A")).digest
    named = make(chat([PART], "A", image_path="a.png"))  # read already: nothing is lost
    assert (len(named.images), named.ignored) == (1, ("image_path",))


def test_a_deep_value_is_not_followed_to_its_end():
    deep = ["x"]
    for _ in range(100_000):
        deep = [deep]
    assert record_keys.looks_like(deep) == ""


# --- regenerate -------------------------------------------------------------------------------------------------------


def test_what_is_not_to_be_learnt_stays_so_with_the_targets_answers(tmp_path):
    question = two_answers(loss_mask=[0, 1], shelf=3)
    question["messages"].append({"role": "user", "content": "More."})
    record, asked = with_answer(question)
    assert asked
    conversation = parse(record, "x", tmp_path)
    new = rewritten(record, conversation, [Answer(0, i, f"new {i}") for i in range(3)], tmp_path)
    assert [turn.get("weight") for turn in new["messages"]] == [None, 0, None, None, None, None]
    assert set(new) == {"messages", "shelf"}
    assert parse(new, "x", tmp_path).messages[1]["weight"] == 0


def test_pictures_named_twice_are_named_once_in_the_targets_answers(make, tmp_path):
    question = {
        "messages": [{"role": "user", "content": "Which?"}],
        "images": ["a.png"],
        "image_path": "a.png",
        "by": "x",
    }
    record, asked = with_answer(question | {"conversations": question["messages"]})
    assert asked
    elsewhere = rewritten(record, parse(record, "x", tmp_path), [Answer(0, 0, "Red.")], tmp_path / "elsewhere")
    assert set(elsewhere) == {"messages", "by"}
    assert parse(elsewhere, "x", tmp_path).images == (str(tmp_path / "a.png"),)

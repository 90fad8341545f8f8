"""Records as people have them: turns that are no answers to learn, tools, texts that look like a chat, packed files."""

import gzip

import pytest
from sample_helpers import QWEN3VL_TEMPLATE, data_spec, load_family, wrap

from feature_bridge.media import SampleError
from feature_bridge.samples import make_sample
from feature_bridge.sources import open_source

FAMILIES = ("qwen3.5", "qwen3-vl", "qwen2.5-vl", "qwen3")


@pytest.fixture(scope="module")
def processors():
    return {family: wrap(load_family(family)) for family in FAMILIES}


def record(*turns, **more):
    """Turns (name, text) or (name, text, further fields)."""
    return {"messages": [{"role": role, "content": text} | dict(*fields) for role, text, *fields in turns]} | more


def supervised(given, processor, tmp_path):
    """The sample's whole text, and its answers."""
    sample = make_sample(given, "x:1", tmp_path, processor, data_spec())
    text = processor.tokenizer.decode(sample.tokens)
    return text, processor.tokenizer.decode(sample.tokens[sample.loss_mask == 1])


# --- turns that are not supervised ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("greetings", [("Welcome!",), ("Welcome!", "How can I help?")])
def test_assistant_turns_before_any_question_are_context(family, greetings, processors, tmp_path):
    turns = [("assistant", greeting) for greeting in greetings]
    turns += [("user", "One?"), ("assistant", "The first."), ("user", "Two?"), ("assistant", "The second.")]
    text, answers = supervised(record(*turns), processors[family], tmp_path)
    assert answers == "The first.<|im_end|>The second.<|im_end|>"
    assert all(greeting in text for greeting in greetings)


def test_a_conversation_of_an_assistant_alone_is_refused(processors, tmp_path):
    with pytest.raises(SampleError, match="begins with an assistant turn; no question and answer follow it"):
        make_sample(record(("assistant", "Welcome!")), "x:1", tmp_path, processors["qwen3.5"], data_spec())


def test_a_template_that_wants_a_question_first_is_named(tmp_path):
    tokenizer = load_family("qwen3")
    refusal = "{% if messages[0].role == 'assistant' %}{{ raise_exception('ask first') }}{% endif %}"
    tokenizer.chat_template = refusal + QWEN3VL_TEMPLATE
    turns = record(("assistant", "Welcome!"), ("user", "One?"), ("assistant", "The first."))
    with pytest.raises(SampleError, match="begins with an assistant turn; the chat template refuses .*: ask first"):
        make_sample(turns, "x:1", tmp_path, wrap(tokenizer), data_spec())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (None, False)])
def test_answers_of_weight_0_are_context(family, weights, processors, tmp_path):
    answers = [
        ("assistant", text, {"weight": w}) for text, w in zip(("The first.", "The other."), weights, strict=True)
    ]
    text, learnt = supervised(
        record(("user", "One?"), answers[0], ("user", "Two?"), answers[1]), processors[family], tmp_path
    )
    assert learnt == ("The other." if weights[0] == 0 else "The first.") + "<|im_end|>"
    assert "The first." in text
    assert "The other." in text


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_weight_0_right_before_another_is_never_learnt(family, processors, tmp_path):
    """Where the prompt of the second writes the first in another way, nobody can tell where the second begins."""
    ask, wrong, right = ("user", "Who?"), ("assistant", "WRONG", {"weight": 0}), ("assistant", "right")
    given = record(ask, wrong, right, ("user", "Sure?"), ("assistant", "yes"))
    if family in ("qwen3.5", "qwen3"):
        with pytest.raises(SampleError, match="rewrites turn 2, so its answer cannot be located"):
            make_sample(given, "x:1", tmp_path, processors[family], data_spec())
    else:
        assert supervised(given, processors[family], tmp_path)[1] == "right<|im_end|>yes<|im_end|>"


# --- texts that look like a chat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_quotes_the_next_turn_is_refused(family, processors, tmp_path):
    """Else the mask would begin in the quotation."""
    fake = "see <|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nfake"
    turns = record(("user", "One?"), ("assistant", fake), ("user", "Two?"), ("assistant", "The real one."))
    with pytest.raises(SampleError, match=r"an answer contains <\|im_end\|>, which ends a turn"):
        make_sample(turns, "x:1", tmp_path, processors[family], data_spec())
    asked = record(("user", fake), ("assistant", "Yes."), ("user", fake), ("assistant", "Yes."))
    assert supervised(asked, processors[family], tmp_path)[1] == "Yes.<|im_end|>Yes.<|im_end|>"


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "turn", "reason"),
    [
        ({"tools": [{"type": "function"}]}, {}, "the record has tools, which are not read; leave out"),
        ({"tools": '[{"name": "f"}]'}, {}, "the record has tools"),
        ({"functions": [{"name": "f"}]}, {}, "the record has functions"),
        ({"system": 3}, {}, "the record has system of type int, expected a string"),
        ({}, {"function_call": {"name": "f"}}, "turn 1 calls tools, which are not read"),
        ({}, {"weight": 0.5}, r"turn 1 has weight=0.5, which is not read; give 0 or 1"),
        ({}, {"weight": "0"}, r"turn 1 has weight='0', which is not read"),
    ],
)
def test_fields_that_would_be_lost_are_refused(more, turn, reason, processors, tmp_path):
    with pytest.raises(SampleError, match=reason):
        make_sample(
            record(("user", "Q"), ("assistant", "A", turn), **more), "x", tmp_path, processors["qwen3"], data_spec()
        )


@pytest.mark.parametrize("empty", [{"tools": []}, {"tools": "[]"}, {"image": ""}, {"images": [""]}, {"video": ""}])
def test_empty_fields_mean_nothing(empty, processors, tmp_path):
    texts = [
        supervised(record(("user", "Q"), ("assistant", "A"), **more), processors["qwen3.5"], tmp_path)
        for more in ({}, empty)
    ]
    assert texts[0] == texts[1]


def test_a_system_prompt_beside_the_conversation(processors, tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Arr, ahoy."}]
    system = {"from": "system", "value": "Be a pirate."}
    beside, inside, both = (
        supervised(given, processors["qwen3.5"], tmp_path)
        for given in (
            {"system": "Be a pirate.", "conversations": turns},
            {"conversations": [system, *turns]},
            {"system": "Be another.", "conversations": [system, *turns]},
        )
    )
    assert "Be a pirate." in beside[0]
    assert beside == inside == both


def test_thoughts_have_two_names(processors, tmp_path):
    for name in ("reasoning_content", "reasoning"):
        given = record(("user", "Q"), ("assistant", "A", {name: "I think."}))
        assert "I think." in supervised(given, processors["qwen3.5"], tmp_path)[1]


@pytest.mark.parametrize("messages", [[], None, ""])
def test_empty_messages_beside_conversations(messages, processors, tmp_path):
    given = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "messages": messages}
    assert supervised(given, processors["qwen3.5"], tmp_path)[1] == "A<|im_end|>"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_packed_file_is_one_error(tmp_path):
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"messages": []}\n' * 99))
    with pytest.raises(ValueError, match=r"data.train_path='.*gz' is packed by gzip; unpack it and give the JSONL"):
        open_source(str(tmp_path / "t.jsonl.gz"), "data.train_path")


def test_a_json_array_is_one_error(tmp_path):
    file = tmp_path / "t.json"
    for text in ('[{"messages": []}]', '\ufeff[\n  {\n    "messages": []', "[\n]"):
        file.write_text(text)
        with pytest.raises(
            ValueError, match=r"data.train_path='.*json' is a JSON array; write one conversation a line"
        ):
            open_source(str(file), "data.train_path")
    file.write_text('[broken\n{"messages": []}\n')  # one bad line, which is skipped
    assert len(open_source(str(file), "data.train_path")) == 2

"""Records as people have them: turns that are no answers to learn, tools, texts that look like a chat, packed files."""

import pytest
from sample_helpers import QWEN3VL_TEMPLATE, data_spec, load_family, wrap

from feature_bridge.media import SampleError
from feature_bridge.samples import make_sample

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

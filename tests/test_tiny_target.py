"""The tiny target in configs/tiny: sizes, format, and that its committed answers are what it says."""

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from feature_bridge.cpu_stand_ins import torchvision_ops

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def pictures(messages: list[dict]) -> list[str]:
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    return [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]


def asked(conversation: dict) -> str:
    return json.dumps([m["content"] for m in conversation["messages"] if m["role"] == "user"])


@pytest.fixture(scope="module")
def loaded():
    """(model in fp32, processor)."""
    torchvision_ops.ensure()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(TINY / "target", dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(str(TINY / "target"))


def test_config_says_what_sglang_reads():
    """transformers fills these in by itself; SGLang fails, or rotates other dimensions, where they are not there."""
    config = json.loads((TINY / "target" / "config.json").read_text())
    text = config["text_config"]
    assert config["vision_config"]["deepstack_visual_indexes"] == []
    assert text["full_attention_interval"] == 4
    assert text["partial_rotary_factor"] == text["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_sizes():
    def size(folder: Path) -> int:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

    assert size(TINY / "target") <= 4_000_000
    assert size(TINY / "pictures") <= 2_000_000
    assert len(read("train")) >= 1200
    assert len(read("eval")) >= 100


def test_checkpoint_is_the_real_class_in_bf16_and_leaves_ids_for_a_mask_token(loaded):
    model, processor = loaded
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert model.config.architectures == ["Qwen3_5ForConditionalGeneration"]
    assert set(model.config.text_config.layer_types) == {"linear_attention", "full_attention"}
    assert len(processor.tokenizer) < model.config.text_config.vocab_size
    with safe_open(TINY / "target" / "model.safetensors", "pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}  # noqa: SIM118


def test_train_and_eval_are_disjoint_and_every_picture_exists():
    train, held_out = read("train"), read("eval")
    assert len({asked(c) for c in train}) == len(train)
    assert not {asked(c) for c in train} & {asked(c) for c in held_out}
    shown = {p for c in (*train, *held_out) for p in pictures(c["messages"])}
    assert len(shown) > 150
    assert all((TINY / p).exists() for p in shown)


def test_all_kinds_are_there_and_answers_are_long_enough_to_draft(loaded):
    tokenizer = loaded[1].tokenizer
    for rows in (read("train"), read("eval")):
        kinds = {"describe", "list", "compare", "count", "json", "follow_up", "digits", "text"}
        assert {c["kind"] for c in rows} == kinds
        answers = [m["content"] for c in rows for m in c["messages"] if m["role"] == "assistant"]
        assert sum(len(tokenizer(a)["input_ids"]) for a in answers) / len(answers) >= 40


def test_chat_template_thinks_nothing_in_the_prompt_and_forgets_it_in_history(loaded):
    processor = loaded[1]
    question = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Q"}],
    }
    answer = {"role": "assistant", "content": "A"}
    shown = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q<|im_end|>\n<|im_start|>assistant\n"
    stub = "<think>\n\n</think>\n\n"

    def render(*messages, generate: bool) -> str:
        return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)

    assert render(question, generate=True) == shown + stub
    assert render(question, answer, generate=False) == f"{shown}{stub}A<|im_end|>\n"
    assert render(question, answer, question, generate=True) == f"{shown}A<|im_end|>\n{shown}{stub}"


def chosen(kind: str, least: int, most: int) -> dict:
    """The first held-out conversation of a kind whose number of pictures lies between `least` and `most`."""
    return next(c for c in read("eval") if c["kind"] == kind and least <= len(pictures(c["messages"])) <= most)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("text", 0, 0), ("describe", 1, 1), ("follow_up", 2, 2), ("list", 3, 4)]
)
@torch.no_grad()
def test_committed_answers_are_the_greedy_ones(loaded, kind, least, most):
    model, processor = loaded
    messages = chosen(kind, least, most)["messages"]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        images = [Image.open(TINY / p) for p in pictures(messages[:i])]
        # A copy: the processor rewrites the messages it is given.
        prompt = processor.apply_chat_template(copy.deepcopy(messages[:i]), tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
        out = model.generate(**inputs, do_sample=False, max_new_tokens=192)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(out).split("<|im_end|>")[0] == message["content"]

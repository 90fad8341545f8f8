"""Regenerating through SGLang's own HTTP server: the answers of the tiny dense model behind it are its greedy ones."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from feature_bridge import regenerate

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Qwen3 with a tokenizer of bytes, ASCII output only."""
    path = make_model("qwen3", tmp_path_factory.mktemp("model"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    target = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    letters = torch.tensor(fast.convert_tokens_to_ids([c for c in alphabet if c.isascii() and c.isalnum()]))
    bias = torch.ones(target.config.vocab_size, dtype=torch.bool)
    bias[letters] = False
    with torch.no_grad():
        target.lm_head.weight[bias] *= 1e-3  # letters win
    target.config.eos_token_id = target.generation_config.eos_token_id = fast.eos_token_id
    target.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    program = Path(__file__).with_name("sglang_server.py")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(program), str(model), str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_answers_are_the_targets_greedy_ones(server, model, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def greedy(messages):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        with torch.inference_mode():
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :])

    questions = ["hello", "what is this", "0123456789"]
    stop = greedy([{"role": "user", "content": questions[0]}])[8]  # a letter that comes: some answers end there
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": "old"},
                        {"role": "user", "content": "more"},
                        {"role": "assistant", "content": "old"},
                    ]
                }
            )
            + "\n"
            for question in questions
        )
    )
    extra = json.dumps({"stop": [stop]})
    command = ["--data", str(data), "--output", str(tmp_path / "out.jsonl"), "--server", server]
    assert regenerate.main([*command, "--max-tokens", "24", "--extra", extra]) == 0
    expected = []
    for question in questions:
        messages = []
        for text in (question, "more"):
            messages.append({"role": "user", "content": text})
            answer, ended, _ = greedy(messages).partition(stop)
            if not ended or not answer:
                del messages[-1]
                break
            messages.append({"role": "assistant", "content": answer})
        if messages:
            expected.append({"messages": messages})
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == expected
    assert found

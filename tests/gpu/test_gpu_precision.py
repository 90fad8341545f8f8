"""Runs in other precisions than the default, and of a text target from CUDA graphs, through their first checkpoint."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gpu_runs
import pytest
import runs

pytestmark = pytest.mark.gpu

STEPS = 8 if gpu_runs.REHEARSAL else 40
ARGUMENTS = ("--max-steps", STEPS, "--save-interval", STEPS // 2, "--eval-interval", STEPS)
DECODED = ("--num-decode", "2", "--max-new-tokens", "16")
TEXT_ROWS = 60  # conversations without pictures

# SGLang's gated delta net refuses float32 on a GPU, so that a target in float32 is transformers'.
CASES = {
    "all float32": (
        *("--target.backend", "huggingface", "--target.dtype", "float32"),
        *("--compute-dtype", "float32", "--bridge.feature-dtype", "float32", *DECODED),
    ),
    "float32 draft of a bfloat16 target": ("--compute-dtype", "float32", *DECODED),
    "bfloat16 draft, float32 slots": ("--bridge.feature-dtype", "float32"),
    "head in 8 bits": ("--loss.head-dtype", "float8_e4m3fn"),
}
HEADS = {
    "all float32": "mapped from the bridge",
    "float32 draft of a bfloat16 target": "embedding is bfloat16 and compute_dtype is float32",
    "bfloat16 draft, float32 slots": "mapped from the bridge",
    "head in 8 bits": "mapped from the bridge",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, the cases' runs beside each other, ended)."""
    out = tmp_path_factory.mktemp("precision")
    names = {case: case.replace(" ", "-").replace(",", "") for case in CASES}
    commands = {case: gpu_runs.train(out, names[case], *ARGUMENTS, *CASES[case]) for case in CASES}
    for command in commands.values():
        command.communicate()
    return {case: (out / names[case], command) for case, command in commands.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_run_through_its_first_checkpoint(case, finished, note):
    run_dir, command = finished[case]
    output = command.end()
    (checked,) = [line for line in output.splitlines() if "this checkpoint's export is the draft in training" in line]
    assert checked.startswith(f"step {STEPS // 2}: ")
    gpu_runs.assert_learns(run_dir, STEPS)
    assert gpu_runs.REHEARSAL or HEADS[case] in output, output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["lossless"] is (True if "--num-decode" in CASES[case] else None)
    note(checked)


# --- a text target, whose layers SGLang's bridge launches from CUDA graphs --------------------------------------------


def write_text_target(directory: Path) -> None:
    """A Qwen3 with random weights and the embedded target's tokenizer; in the bridge's Python, which has torch."""
    source = runs.TINY / "target"
    code = f"""
import json, pathlib, shutil, sys
sys.path.insert(0, {str(Path.cwd())!r})
import torch
from feature_bridge.cpu_stand_ins import torchvision_ops
torchvision_ops.ensure()
from transformers import Qwen3Config, Qwen3ForCausalLM
source, directory = pathlib.Path({str(source)!r}), pathlib.Path({str(directory)!r})
own = json.loads((source / "config.json").read_text())
text = own.get("text_config", own)
torch.manual_seed(0)
config = Qwen3Config(vocab_size=text["vocab_size"], hidden_size=128, intermediate_size=256, num_hidden_layers=6,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=False,
    eos_token_id=text.get("eos_token_id"), bos_token_id=None, pad_token_id=None)
Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
for file in source.iterdir():
    if file.name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab", "merges", "added_tokens")):
        shutil.copy(file, directory)
"""
    subprocess.run([gpu_runs.BRIDGE_PYTHON, "-c", code], check=True, timeout=gpu_runs.LIMIT_S)


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory):
    """(directory, run from CUDA graphs, run without them), ended."""
    out = tmp_path_factory.mktemp("text")
    write_text_target(out / "target")
    lines = (runs.TINY / "train.jsonl").read_text().splitlines(keepends=True)
    (out / "text.jsonl").write_text("".join([line for line in lines if "image_url" not in line][:TEXT_ROWS]))
    own = ("--target.path", out / "target", "--draft.target-layer-ids", "1", "3", "4", "--epochs", "50", *DECODED)
    own += ("--data.train-path", out / "text.jsonl", "--data.eval-path", out / "text.jsonl", "--draft.head-dim", "64")
    graphs = gpu_runs.train(out, "graphs", *ARGUMENTS, *own)
    graphs.communicate()
    plain = gpu_runs.train(out, "plain", *ARGUMENTS, *own, "--bridge.no-cuda-graphs")
    plain.communicate()
    return out, graphs, plain


def test_a_text_target_from_cuda_graphs_gives_the_same_losses(text_runs):
    out, graphs, plain = text_runs
    graphs.end()
    plain.end()
    for split in ("train", "eval"):
        assert gpu_runs.losses(out / "graphs", split) == gpu_runs.losses(out / "plain", split)
    log = (out / "graphs" / "bridge.log").read_text()
    given_up = [line for line in log.splitlines() if "not from CUDA graphs" in line]
    assert not given_up, given_up

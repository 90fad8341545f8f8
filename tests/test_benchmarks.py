"""The benchmarks run: tiny shapes, no statement about speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from runs import write_data

from jaxdraft.cli import load_config

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny"


def test_step_quick():
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--profile", "1", "--floor", "--peers"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "attention auto = xla" in result.stdout
    rows = re.findall(r"^\| tiny \| ours, attention auto(, with optimizer)? \| [\d.]+ \|", result.stdout, re.M)
    assert rows == 2 * ["", ", with optimizer"]  # as they are measured, and in the table
    assert re.findall(r"^\| tiny \| (products.*? alone) \| [\d.]+ \|", result.stdout, re.M) == 2 * [
        "products alone", "products and attention alone"
    ]  # fmt: skip
    assert result.stdout.count("in shard_map the same bits: True") == 2
    assert re.findall(r"^tiny, (\w+): loss .*, ours .* relative difference of the gradients", result.stdout, re.M) == [
        "SpecForge", "speculators"
    ]  # fmt: skip
    peers = re.findall(r"^\| tiny \| (\w+), sdpa, ([\w ,]+) \| [\d.]+ \|", result.stdout, re.M)
    assert peers[:4] == peers[4:] == [
        ("SpecForge", "chunk 128"), ("SpecForge", "chunk 0"),
        ("speculators", "float32 weights, autocast"), ("speculators", "bfloat16 weights"),
    ]  # fmt: skip


def test_attention_quick():
    command = [sys.executable, "-m", "benchmarks.step_attention", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.findall(r"^\| (\d+) \| (whole|S/4) \| [\d,]+ \|", result.stdout, re.M) == [
        ("48", "whole"), ("48", "S/4"), ("96", "whole"), ("96", "S/4")
    ]  # fmt: skip


def test_what_a_step_sends():
    """Results alone, where an asynchronous collective's shape has its operands before them."""
    from benchmarks.several_gpus_steps import collectives, difference

    hlo = """
      %sum = f32[1000,4]{1,0} all-reduce(%a), channel_id=1, to_apply=%add
      %both = (bf16[8000]{0}, bf16[8000]{0}) all-reduce-start(%b, %c), to_apply=%add
      %once = (bf16[8000]{0}, bf16[8000]{0}) all-reduce-start(%b), to_apply=%add
      %whole = (bf16[4000]{0}, bf16[8000]{0}) all-gather-start(%d), dimensions={0}
      %part = f32[5000]{0} reduce-scatter(%e), dimensions={0}
      %done = bf16[8000]{0} all-gather-done(%whole)
    """
    assert collectives(hlo) == (
        "1 x all-gather bf16 0.02 MB, 3 x all-reduce bf16 0.05 MB, 1 x all-reduce f32 0.02 MB, "
        "1 x reduce-scatter f32 0.02 MB"
    )
    assert collectives("%x = f32[2]{0} add(%a, %b)") == "none"
    assert difference([4.4, 0.12], [4.0, 0.1]) == pytest.approx(0.1)


def test_families():
    command = [sys.executable, "-m", "benchmarks.families", "--families", "qwen2_5_vl"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    row = result.stdout.splitlines()[-1]
    text, one, several, video, mixed = re.fullmatch(
        r"\| qwen2_5_vl \| sglang \S+ \(cpu\) \| set_eagle3_layers_to_capture \| layer_output \| (\S+) \| (\S+) "
        r"\| (\S+) \| \S+ \(frames together: (\S+)\) \| \S+ \(frames together: (\S+)\) \|",
        row,
    ).groups()
    assert max(map(float, (text, one, several, video, mixed))) < 1e-5


def test_useful_work():
    """50.2 and 73.3 TFLOP: the figures by which published times are compared."""
    program = (
        "from benchmarks.step import SHAPES; print(*(f'{SHAPES[x].useful_flop() / 1e12:.1f}' for x in ('4b', '8b')))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["50.2", "73.3"]


def test_the_floor_leaves_out_what_a_step_does():
    """Of the useful work: attention, slot 0 of the head and of the last MLP, MASK's projections of layer 0 but one."""
    program = (
        "from benchmarks.step_floor import trained_products; from benchmarks.step_shapes import SHAPES; "
        "s = SHAPES['4b']; print(s.useful_flop() / 1e12, sum("
        "2 * p.tokens * p.width * sum(p.outs) * (2 + p.input_gradient) for p in trained_products(s)) / 1e12)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    useful, products = map(float, result.stdout.split())
    blocks, h = 512, 2560
    attention = 14 * 5 * 16 * blocks * (3072 / 2 + 16) * 32 * 128
    head = 4 * blocks * 16 * h * 248_320
    left_out = 6 * blocks * h * (3 * 9728 + 14 * (32 + 2 * 8) * 128)
    assert products == pytest.approx(useful - (attention + head + left_out) / 1e12, rel=1e-9)


def test_serve(tmp_path):
    """With a stand-in for SGLang that counts as it does: the replay has the same calls and the same tau."""
    from jaxdraft.export import export_draft
    from jaxdraft.model.dflash import init_params
    from jaxdraft.model.tensors import to_tensors
    from jaxdraft.target import make_draft_config, open_target

    config = load_config("tiny_qwen35vl.py")
    target = open_target(config.target)
    draft = make_draft_config(config.draft, target)
    export_draft(to_tensors(init_params(draft, jax.random.key(0)), draft), draft, target.config, tmp_path / "draft")
    # Short answers that are not too short to count, with and without a picture.
    lines = (TINY / "eval.jsonl").read_text().replace("pictures/", f"{TINY}/pictures/").splitlines()
    length = {line: len(json.loads(line)["messages"][-1]["content"]) for line in lines}
    lines = sorted((line for line in lines if length[line] > 80), key=length.get)
    chosen = [next(line for line in lines if ("image_url" in line) == pictured) for pictured in (True, False)]
    (tmp_path / "eval.jsonl").write_text("\n".join(chosen) + "\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}/tests/fake_sglang:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    command = [sys.executable, "-m", "benchmarks.serve", "--draft", str(tmp_path / "draft"), "--number", "2"]
    command += [
        "--engine-python",
        str(python),
        "--out",
        str(tmp_path / "out"),
        "--faults",
        "",
        "--engine-limit",
        "900",
        "--",
    ]
    command += ["--target.backend", "huggingface", "--bridge.feature-dtype", "float32", "--data.num-workers", "1"]
    command += ["--data.eval-path", str(tmp_path / "eval.jsonl")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "equal to the target's alone: 2 of 2" in result.stdout
    assert "length in the server is not the training sample's: 0" in result.stdout
    assert "the same number of verify calls as in the replay: 2 of 2" in result.stdout
    assert re.search(r"^\| all \| 2 \| (\d+), \1 \| ([\d.]+), \2 \| \+0.00% \| ([\d.]+), \3 \|", result.stdout, re.M)


def test_bridge_quick(tmp_path):
    """Its row: target and data, a bridge, the hand-over and the capture; the steps are `test_step_quick`'s."""
    for command in (
        ["benchmarks.bridge_data", str(tmp_path), "--quick"],
        ["benchmarks.bridge_row", str(tmp_path), "--quick", "--phases", "hand-over,capture", "--rows", "3"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
    table = dict(line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| "))
    assert table["pointers equal the slot's"] == "all of 3 rows"
    assert re.match(r"[\d,]+ tokens/s, [\d.]+ samples/s", table["capture alone, throughput"])


def test_a_stopped_bridge(tmp_path):
    """A whole run whose bridge gets SIGSTOP: it is noticed, named and replaced, and nothing is left."""
    command = [sys.executable, "-m", "benchmarks.bridge", "--quick", "--parts", "hang", "--out", str(tmp_path)]
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}  # to compile
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | fast, capture_output=True, text=True, timeout=1800, check=False
    )
    rows = dict(re.findall(r"^\| ([^|]*) \| (.*) \|$", result.stdout, re.M))
    assert "<!-- hang: " in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]
    assert "exit code 0 -->" in result.stdout, result.stdout[-3000:]
    # Silence counts from the trainer's wait, which may have begun up to a ping (1 s) before the signal.
    assert float(rows["bridge stopped (SIGSTOP): noticed after"].split()[0]) >= 3
    assert "did not answer and did nothing for 4 s: it hangs (see DIR/hang/bridge.log)" in rows["said"]
    assert rows["end of the run"] == "exit code 0, step 14 of 14"
    assert rows["loss of 14 steps"].endswith("all finite: True")
    assert rows["processes left"] == "none"


def test_several_gpus(tmp_path):
    """On virtual devices: a mesh beside one device, and a bridge on each of two."""
    command = [sys.executable, "-m", "benchmarks.several_gpus", "--quick", "--devices", "2", "--out", str(tmp_path)]
    command += ["--parts", "steps,bridge", "--meshes", "fsdp", "--targets", "each"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    rows = dict(re.findall(r"^\| ([^|]*) \| (.*) \|$", result.stdout, re.M))
    assert float(rows["fsdp=2: losses 1 and 20"].split()[-1]) < 1e-3
    assert "all-gather" in rows["fsdp=2: sends"]
    assert "all-to-all" not in rows["fsdp=2: sends"], "activations are sent where weights should be"
    assert rows["a target on each of 2 GPUs"].startswith("8 rows: the same bits")


def test_regenerate_quick(tmp_path):
    """The client alone against the fake server, and a server that is not there."""
    command = [sys.executable, "-m", "benchmarks.regenerate"]
    result = subprocess.run([*command, "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (row,) = re.findall(r"^\| fake, 0.05 s \| 16 \| (.*) \| 0% \|$", result.stdout, re.M)
    answers, tokens, *_ = row.replace(",", "").split(" | ")
    assert float(answers) > 0
    assert float(tokens) == pytest.approx(320 * float(answers), rel=0.2)  # answers/s are rounded
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    command += ["--server", "http://127.0.0.1:9", "--data", str(tmp_path / "prompts.jsonl")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 2
    assert re.match(r"error: http://127.0.0.1:9/v1 does not answer \(.*\n$", result.stderr)


def test_recipe_quick(tmp_path):
    """Variants of two seeds on the embedded target; a second call has nothing left to do, and captures nothing."""
    write_data(tmp_path)
    held_out = tmp_path / "eval.jsonl"
    command = [sys.executable, "-m", "benchmarks.recipe", "--quick", "--config", "tiny_qwen35vl.py"]
    command += [
        "--target",
        str(TINY / "target"),
        "--data",
        str(tmp_path / "train.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--held-out", f"a={held_out}", f"b={held_out}", "--groups", "base,batch", "--seeds", "0,1"]
    command += ["--steps", "2", "--points", "2", "--", "--data.cache-dir", "None", "--target.backend", "huggingface"]
    for first in (True, False):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        assert ("| base | 0 | 2 |" in result.stdout) == first
        assert ("data 0: " in result.stdout) == first
    found = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert {name: len(one["curve"]) for name, one in found.items()} == {
        f"{name}, seed {seed}": points
        for name, points in (("base", 2), ("2 rows a step, half the steps", 1), ("2 rows a step", 2))
        for seed in (0, 1)
    }
    last = [found[f"base, seed {seed}"]["curve"][-1] for seed in (0, 1)]
    assert last[0]["a"] == last[0]["b"]
    assert last[0]["held_out_loss"] != last[1]["held_out_loss"]

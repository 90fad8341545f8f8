"""`benchmarks.journey`: its pure parts, what it refuses, and the whole of --quick; serving, against a stand-in."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.journey import answers, drafts, inputs, kit, report, serving, settings, stand_in, training
from benchmarks.journey.notes import Notes, StageError, load, save
from benchmarks.journey.serve_compare import compare_texts, difference, tie_of
from jaxdraft.cli import parse_args

ROOT = Path(__file__).parents[1]


def journey(*words, out):
    return dataclasses.replace(settings.parse(words, ""), out=Path(out))


# --- the kit ----------------------------------------------------------------------------------------------------------


def conversation(*asked):
    return {"conversations": [turn for text in asked for turn in ({"from": "human", "value": text}, {"from": "gpt"})]}


def test_questions_are_usable_and_never_alike():
    assert not kit.is_usable("too short")
    assert not kit.is_usable("x" * 1201)
    assert not kit.is_usable("日本語の質問をここに書いてください")
    long = "the same beginning of many words, " * 3
    records = [
        conversation("What is a hammer?", "short", long + "one"),
        conversation("WHAT is a hammer?", long + "two"),
    ]
    assert kit.questions(records) == ["What is a hammer?", long + "one"]
    assert kit.questions(records, 1) == ["What is a hammer?"]


def test_a_held_out_question_is_never_trained_on():
    """Whichever turn it is in, and however it is written."""
    records = [conversation(*(f"Question {c} number {i}?" for i in range(6))) for c in range(20)]
    records.append(conversation(*(f"QUESTION {c} number {i}?" for c in range(20) for i in range(4))))
    train, held_out = kit.split(records, 10)
    assert len(held_out) == 10
    assert len(train) == 6 * 20 - 10  # later turns are trained on, too
    assert not set(map(kit.key_of, train)) & set(map(kit.key_of, held_out))
    assert kit.split(records, 10) == (train, held_out)


def test_a_file_that_ends_in_a_record():
    whole = json.dumps([conversation("one"), conversation("two"), conversation("three")], indent=2)
    assert kit.read_sharegpt(whole[: whole.index("three")]) == [conversation("one"), conversation("two")]


def test_pieces_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "MODEL_BYTES", 10)
    (tmp_path / "whole").write_bytes(b"0123456789")
    kit.cut(tmp_path / "whole", tmp_path, 4)
    assert [piece.name for piece in kit.pieces_of(tmp_path)] == ["g0", "g1", "g2"]
    (tmp_path / "scratch").mkdir()
    assert kit.whole_model(tmp_path, tmp_path / "scratch").read_bytes() == b"0123456789"
    (tmp_path / "g2").unlink()
    with pytest.raises(ValueError, match="2 pieces in .* have 8 of 10 bytes; one is missing"):
        kit.whole_model(tmp_path, tmp_path / "scratch")


def test_prompts_are_conversations(tmp_path):
    kit.write_prompts(tmp_path / "a.jsonl.gz", "a", ["one?", "two?"])
    assert [json.loads(line) for line in answers.read_lines(tmp_path / "a.jsonl.gz")] == [
        {"id": f"a-{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(("one?", "two?"))
    ]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_trainer_is_killed_after_a_checkpoint():
    for steps, interval in ((10_000, 500), (1686, 250), (9, 2), (900, 500)):
        chosen = {training.choose_step(steps, interval, seed) for seed in range(50)}
        assert min(chosen) > interval
        assert max(chosen) < steps
        assert max(chosen) <= max(0.6 * steps, interval + 1)
        assert training.choose_step(steps, interval, 3) == training.choose_step(steps, interval, 3)
    with pytest.raises(StageError, match="saves nothing before its end; lower --save-interval 500"):
        training.choose_step(400, 500, 0)


def test_losses_are_compared_to_the_last_bit(tmp_path):
    before, after = {1: 1.5, 2: 0.1, 3: 0.3}, {1: 9.0, 2: 0.1, 3: 0.1 + 0.2, 4: 2.0}
    assert training.compare(before, after, 2) == ([2], [3])
    lines = [{"split": "train", "step": 1, "loss": 0.1}, {"split": "eval", "step": 1, "tau": 2.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tra')  # SIGKILL
    assert training.read_losses(file) == {1: 0.1}
    assert training.read_metrics(file, "eval")[1]["tau"] == 2.0
    assert training.read_losses(tmp_path / "none") == {}


# --- serving ----------------------------------------------------------------------------------------------------------


def test_texts_part_at_a_near_tie_or_differ():
    assert difference([1, 2, 3], [1, 2, 3]) is None
    assert difference([1, 2, 3], [1, 4, 3]) == 1
    best = [(-0.5, 7), (-0.7, 8), (-4.0, 9)]
    assert tie_of(best, 7, 8) == pytest.approx(0.2)
    assert tie_of(best, 9, 8) == pytest.approx(3.5)  # neither is the best one: the less likely one counts
    assert tie_of(best, 7, 10) is None
    alone = [{"tokens": [1, 2]}, {"tokens": [1, 7]}, {"tokens": [1, 7]}, {"tokens": [1, 7]}]
    draft = [{"tokens": [1, 2]}, {"tokens": [1, 8]}, {"tokens": [1, 9]}, {"tokens": [1, 9]}]
    texts = compare_texts([4, 5, 6, 7], alone, draft, {"5": {"gap": 0.2}, "6": {"gap": 3.5}, "7": {"gap": None}})
    assert (texts.equal, texts.near_ties, texts.different) == (1, 1, (6, 7))
    assert str(texts) == (
        "1 of 4 token for token the target's own, 1 up to a near tie (at most 0.200), others: rows [6, 7]"
    )


def test_flags_of_the_server():
    real = settings.parse(
        ["--target", "real", "--kit", "k", "--server-args", "--mem-fraction-static 0.4 --enable-metrics"], ""
    )
    flags = settings.server_flags(real, settings.SERVE)
    assert flags[-3:] == ["--mem-fraction-static", "0.4", "--enable-metrics"]  # the user's last: it counts
    assert "--enable-multimodal" not in flags
    assert "--enable-multimodal" in settings.server_flags(settings.parse([], ""), settings.SERVE)


@pytest.mark.parametrize("words", [(), ("--quick",), ("--target", "real", "--kit", "k", "--block-size", "16")])
def test_every_command_line_is_one_of_the_trainers(tmp_path, words):
    """The user's own fields come last, and count."""
    whole = journey(*words, "--", "--epochs", "2", "--bridge.restarts", "1", out=tmp_path)
    config = parse_args(["--config", whole.target.config, *whole.config_fields])
    assert config.run_dir == whole.run_dir
    assert (config.epochs, config.bridge.restarts) == (2, 1)
    assert config.data.eval_path == str(whole.held_out(whole.target.held_out[0]))
    if words != ("--quick",):
        assert (config.trainer.memory_fraction, config.bridge.memory_fraction) == (0.6, 0.3)
        assert (config.bridge.transport, config.target.backend) == ("cuda_ipc", "sglang")
    if "real" in words:
        assert (config.draft.block_size, config.draft.mask_token_id, config.loss.gamma) == (16, 4, "auto")


def test_sglang_knows_the_flags():
    """The installed version's own parser, in a process of its own."""
    program = """
import argparse, sys
from feature_bridge import cpu_stand_ins
cpu_stand_ins.install_before_sglang()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
parser.parse_args(sys.argv[1:])
"""
    whole = settings.parse([], "")
    more = settings.REGENERATE | settings.TARGETS["real"].regenerate | settings.SERVE
    flags = settings.server_flags(whole, more | settings.speculative(Path("draft")))
    command = [sys.executable, "-c", program, "--model-path", "m", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- reports and refusals ---------------------------------------------------------------------------------------------


def test_the_table_has_every_stage(tmp_path, capsys):
    notes = Notes("train")
    notes.say("loss", "1.0")
    notes.require(False, "resumed", "it began anew")
    notes.seconds = 2.4
    save(tmp_path, notes)
    save(tmp_path, Notes("check", seconds=1.0))
    assert report.table_of(load(tmp_path), ["regenerate", "train", "check"]).splitlines()[2:] == [
        "| regenerate | not run | |",
        "| train | loss | 1.0 |",
        "|  | resumed | **it began anew** |",
        "| all | 3 s of stages | **1 faults** |",
    ]
    assert notes.faults == ["resumed: it began anew"]
    assert "| train | loss | 1.0 |" in capsys.readouterr().out


def test_the_verdicts_of_a_check_are_read():
    log = "title\n│ files     │    same │\n│ sglang │ not run │           - │\n└──┘\n"
    assert drafts.table_rows(log) == [["files", "same"], ["sglang", "not run", "-"]]


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--stages train2 is none of regenerate, train"):
        settings.parse(["--stages", "train2"], "")
    with pytest.raises(ValueError, match="--target real needs --kit; `python -m benchmarks.journey.kit DIR --convert`"):
        settings.parse(["--target", "real"], "")
    with pytest.raises(ValueError, match="--quick knows the embedded target alone"):
        settings.parse(["--target", "real", "--kit", "x", "--quick"], "")
    real = journey("--target", "real", "--kit", str(tmp_path), out=tmp_path)
    with pytest.raises(
        ValueError, match=r"sharegpt.jsonl is not there; `python -m benchmarks.journey.kit .* --convert`"
    ):
        inputs.check_inputs(real)
    with pytest.raises(ValueError, match="--data .*none.jsonl is not there; give a .jsonl"):
        inputs.check_inputs(journey("--data", str(tmp_path / "none.jsonl"), out=tmp_path))
    with pytest.raises(ValueError, match="train.jsonl is not there; run the stage regenerate before"):
        inputs.check_inputs(journey("--stages", "train", out=tmp_path))
    with pytest.raises(ValueError, match="config.json is not there; run the stage train before"):
        inputs.check_inputs(journey("--stages", "serve", out=tmp_path))

    embedded = journey(out=tmp_path)
    monkeypatch.setattr(inputs, "smi", lambda query: [])
    with pytest.raises(ValueError, match="there is no GPU here .* or give --quick"):
        inputs.check_inputs(embedded)
    monkeypatch.setattr(inputs, "smi", lambda query: ["143771, 143000"])
    with pytest.raises(ValueError, match="--bridge-python .*nowhere cannot be run .No such file"):
        inputs.check_inputs(dataclasses.replace(embedded, bridge_python="/nowhere"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without what is installed
    python.chmod(0o700)
    with pytest.raises(ValueError, match="--server-python .*python has no sglang; give"):
        inputs.check_inputs(dataclasses.replace(embedded, server_python=str(python)))


@pytest.mark.parametrize(
    ("free", "problem"),
    [(8, "has 8 GiB free and trainer and bridge need 16"), (100, "are 126 GiB .* has 100 free"), (139, "")],
)
def test_too_little_memory_for_both(tmp_path, free, problem):
    found = inputs.memory_problem(journey(out=tmp_path), 140, free)
    assert bool(found) == bool(problem)
    if problem:
        assert re.search(problem, found)


# --- the whole of it --------------------------------------------------------------------------------------------------


def test_the_stand_in_knows_what_was_said():
    known = stand_in.read_answers()
    messages = json.loads((settings.TINY / "train.jsonl").read_text().splitlines()[0])["messages"]
    assert known[stand_in.key_of(messages[:-1])] == messages[-1]["content"]


def test_a_quick_journey(tmp_path, monkeypatch):
    """All that a CPU can do, by the command; then the server stage, with a stand-in for SGLang's server."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.journey", "--quick", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    found = load(out)
    assert {*found, "report"} == set(settings.STAGES)
    lines = {(stage, what): measured for stage in found for what, measured in found[stage]["lines"]}
    assert lines["train", "steps in metrics.jsonl"] == "9 of 9"
    assert lines["train", "losses of the steps that were trained twice"].endswith("equal to the last bit, 0 differ")
    assert lines["convert", "tensors there and back"].endswith("equal to the last bit")
    assert lines["check", "torch"].startswith("same, logit error")
    assert "no DFLASH on a CPU" in lines["serve", "left out"]
    assert "| all | " in result.stdout

    # Stages by themselves, on what is there: nothing is asked again, and what was measured stays.
    command += ["--stages", "regenerate,convert,report"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    lines = {(stage, what): measured for stage, one in load(out).items() for what, measured in one["lines"]}
    assert lines["regenerate", "answers"] == "all are there"
    assert lines["regenerate", "train: kept"] == "13 answers of 12 conversations, 0 cut off, 0 left out"
    assert "| train | SIGKILL |" in again.stdout

    serve_with_a_stand_in(out, tmp_path, monkeypatch)


def serve_with_a_stand_in(out, tmp_path, monkeypatch):
    """Two short answers, one of them about a picture."""
    lines = answers.read_lines(settings.TINY / "eval.jsonl")
    lines = [line.replace("pictures/", f"{settings.TINY}/pictures/") for line in lines]
    lines = sorted((line for line in lines if len(answer_of(line)) > 50), key=lambda line: len(answer_of(line)))
    chosen = [next(line for line in lines if ("image_url" in line) == pictured) for pictured in (True, False)]
    (out / "answers" / "pictures.jsonl").write_text("".join(chosen))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}/tests/fake_sglang:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setenv("FAKE_SGLANG_DATA", str(out / "answers" / "pictures.jsonl"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notes = Notes("serve")
    serving.serve(journey("--server-python", str(python), "--concurrency", "1,2", out=out), notes)
    assert not notes.faults
    measured = dict(notes.lines)
    for level in (1, 2):
        assert measured[f"text, {level} requests at a time"] == "2 of 2 token for token the target's own"
        assert "alone" in measured[f"tokens/s, {level} requests at a time"]
    assert "+0.00%" in measured["tau by SGLang's counts, replay of the same answers"]
    assert measured["answers read back token for token"] == "2 of 2, 2 with as many verify calls as in the replay"


def answer_of(line):
    return json.loads(line)["messages"][-1]["content"]


def test_answers_made_earlier_are_taken(tmp_path):
    """Packed or not; nothing is asked then."""
    line = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (tmp_path / "a.jsonl").write_text(line)  # without an end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"{line}\n".encode()))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")]
    held_out = [f"{name}={files[1]}" for name in ("pictures", "text")]
    taken = journey("--data", *files, "--held-out", *held_out, out=tmp_path / "out")
    notes = Notes("regenerate")
    answers.regenerate(taken, notes)
    assert notes.lines == [("answers to train on", "2, made earlier"), ("answers", "all are there")]
    assert taken.train_data.read_text() == f"{line}\n{line}\n"

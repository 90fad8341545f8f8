"""Whole runs: the summary, samples that are left out, and mistakes that end in one sentence."""

from __future__ import annotations

import json

import pytest
import runs

SUMMARY_KEYS = {
    "tau_teacher_forced", "tau_replay", "tau_decoded", "accept_len", "lossless", "rows_per_second", "steps", "seconds",
    "target_backend", "skipped_samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over data with a broken line, a truncated picture and a missing one; (directory, output)."""
    directory = runs.write_data(tmp_path_factory.mktemp("run"))
    lines = (directory / "train.jsonl").read_text().splitlines()
    picture = runs.TINY / "pictures" / "key.png"
    (directory / "cut.png").write_bytes(picture.read_bytes()[:200])

    def showing(file):
        content = [{"type": "image_url", "image_url": {"url": file}}, {"type": "text", "text": "What is this?"}]
        answer = "It is a key, and it opens exactly one lock. " * 3
        return json.dumps(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
        )

    lines[2:2] = ['{"messages": [', showing("cut.png"), showing("none.png")]
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = runs.write_config(directory)
    code, output = runs.run(config, "--num-decode", "2", "--max-new-tokens", "12", "--accumulation", "2")
    assert code == 0, output[-3000:]
    return directory, output


def test_summary_and_files(finished):
    directory, output = finished
    run_dir = directory / "runs" / "small"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 9
    assert summary["lossless"] is True
    assert summary["tau_decoded"] >= 1
    assert summary["tau_teacher_forced"] == pytest.approx(summary["accept_len"] + 1)
    assert summary["target_backend"].startswith("huggingface transformers")
    assert (run_dir / "export" / "model.safetensors").is_file()
    assert (run_dir / "export" / "config.json").is_file()
    assert list((run_dir / "tensorboard").glob("events*"))
    for words in ("token for token the target's own greedy output", "teacher-forced", "replayed", "decoded", "export"):
        assert words in output


def test_metrics_of_every_step(finished):
    directory, _ = finished
    train = runs.metrics(directory / "runs" / "small")
    assert list(train) == list(range(1, 10))
    names = {
        "loss", "accuracy", "slot_accuracy", "tau", "accept_len", "learning_rate", "grad_norm", "rows_per_second",
        "tokens_per_second", "seconds_waiting", "skipped_samples",
    }  # fmt: skip
    assert all(line.keys() >= names for line in train.values())
    assert len(train[1]["slot_accuracy"]) == 3
    assert train[9]["loss"] < train[1]["loss"]
    evaluated = runs.metrics(directory / "runs" / "small", "eval")
    assert list(evaluated) == [4, 8, 9]


def test_bad_samples_are_skipped_counted_and_listed(finished):
    directory, output = finished
    run_dir = directory / "runs" / "small"
    assert json.loads((run_dir / "summary.json").read_text())["skipped_samples"] == 3
    listed = {line["where"]: line["reason"] for line in map(json.loads, (run_dir / "skipped.jsonl").open())}
    assert [where.rsplit(":", 1)[1] for where in listed] == ["3", "4", "5"]
    reasons = list(listed.values())
    assert "JSON" in reasons[0]
    assert "cut.png" in reasons[1]
    assert "none.png" in reasons[2]
    assert "train.jsonl:4" in output.replace("\n", "")


def test_same_command_again_only_finishes(finished):
    directory, _ = finished
    config = directory / "small.py"
    code, output = runs.run(config, "--num-decode", "0", "--accumulation", "2")
    assert code == 0, output[-3000:]
    assert "resuming from step 9" in output
    assert "step 1/9" not in output


def test_training_goes_on_from_an_exported_draft(finished):
    directory, _ = finished
    exported = directory / "runs" / "small" / "export"
    code, output = runs.run(
        directory / "small.py", "--name", "again", "--draft.init-from", str(exported), "--max-steps", "1"
    )
    assert code == 0, output[-3000:]
    first = runs.metrics(directory / "runs" / "again")[1]["loss"]
    losses = {step: line["loss"] for step, line in runs.metrics(directory / "runs" / "small").items()}
    assert first < losses[2]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--target.path", "/nowhere/model"), "target.path='/nowhere/model' does not exist"),
        (("--target.embed-key", "model.tok.weight"), "target.embed_key=model.tok.weight.*candidates"),
        (("--data.train-path", "/nowhere/data.jsonl"), "data.train_path=.*nowhere"),
        (("--draft.target-layer-ids", "1", "7"), "target_layer_ids"),
        (("--draft.init-from", "/nowhere/draft"), "/nowhere/draft"),
        (("--mesh.tensor", "3"), "mesh.tensor=3"),
        (("--bridge.python", "/nowhere/python"), "/nowhere/python"),
    ],
)
def test_mistakes_end_in_one_sentence(finished, tmp_path, args, named):
    directory, _ = finished
    code, output = runs.run(directory / "small.py", "--output-dir", str(tmp_path), *args)
    assert code == 2, output[-2000:]
    assert "Traceback" not in output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    import re

    assert re.search(named, sentence), sentence


def test_empty_data_and_no_sample_that_fits(tmp_path):
    runs.write_data(tmp_path)
    config = runs.write_config(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    code, output = runs.run(config)
    assert code == 2
    assert "error: data.train_path" in output.replace("\n", " ")
    short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(short) + "\n")
    code, output = runs.run(config)
    assert code == 2
    assert "error: data.train_path" in output.replace("\n", " ")
    assert "supervised" in output

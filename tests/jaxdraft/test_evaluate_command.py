"""The whole of `python -m jaxdraft.evaluate` on the embedded target: bridge, frozen head, replay, real decoding."""

import dataclasses
import io
import json
import os
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxdraft import check, evaluate, held_out
from jaxdraft.cli import load_config
from jaxdraft.convert import load_draft
from jaxdraft.evaluate import evaluate_draft, main, print_evaluation
from jaxdraft.export import export_draft
from jaxdraft.held_out import open_held_out
from jaxdraft.model.dflash import init_params
from jaxdraft.model.tensors import to_tensors
from jaxdraft.target import make_draft_config, open_target

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The demo's config on its first held-out conversations, with the transformers target in this process."""
    root = tmp_path_factory.mktemp("data")
    lines = (TINY / "eval.jsonl").read_text().splitlines()[:6]
    (root / "eval.jsonl").write_text("\n".join(lines).replace("pictures/", f"{TINY}/pictures/") + "\n")
    config = load_config("tiny_qwen35vl.py")
    return dataclasses.replace(
        config,
        output_dir=str(root / "runs"),
        target=dataclasses.replace(config.target, backend="huggingface"),
        data=dataclasses.replace(
            config.data,
            train_path="there is none.jsonl",  # with eval_path, evaluation does not read it
            eval_path=str(root / "eval.jsonl"),
            cache_dir=None,
            num_workers=1,
        ),
        bridge=dataclasses.replace(config.bridge, transport="in_process", feature_dtype="float32", verify=False),
        num_decode=3,
        max_new_tokens=20,
    )


@pytest.fixture(scope="module")
def directory(config, tmp_path_factory):
    target = open_target(config.target)
    draft = make_draft_config(config.draft, target)
    directory = tmp_path_factory.mktemp("drafts") / "draft"
    return export_draft(to_tensors(init_params(draft, jax.random.key(0)), draft), draft, target.config, directory)


def test_evaluate(config, directory):
    summary = evaluate_draft(directory, config, Console(quiet=True), temperature=0.8)
    assert summary["num_decoded"] == 3
    assert summary["lossless"] is True
    assert summary["replay_compared"] == summary["replay_identical"] == 3  # the recorded answers are the target's own
    assert summary["replay_agrees"] is True
    assert summary["calibration"]["decoded_over_replay"] == 1.0
    for name in ("tau_teacher_forced", "tau_replay", "tau_decoded"):
        assert 1 <= summary[name] < 1.5  # an untrained draft
    assert sum(t for t, _ in summary["decoded"]) / sum(c for _, c in summary["decoded"]) == summary["tau_decoded"]
    assert len(summary["slot_acceptance"]) == config.draft.block_size - 1
    whole = summary["tau_table"][0]
    assert (whole["kind"], whole["tau"]) == ("all", pytest.approx(summary["tau_replay"]))
    assert {bucket["kind"] for bucket in summary["tau_table"]} == {"all", "modality", "position", "length"}
    assert (summary["temperature"], 1 <= summary["tau_sampled"] < 2) == (0.8, True)
    console = Console(record=True, width=120, file=io.StringIO())
    print_evaluation(console, summary)
    text = console.export_text()
    for words in ("several pictures", "position 0-31", "at temperature 0.8", "intervals", "1.000 x replayed"):
        assert words in text


def test_the_configs_attention_is_used(config, directory):
    with pytest.raises(ValueError, match="attention='mosaic' needs a Hopper GPU"):
        evaluate_draft(directory, dataclasses.replace(config, attention="mosaic"), Console(quiet=True))


def test_the_expected_speedup(config, monkeypatch, tmp_path, capsys):
    summary = {
        "draft": "d", "tau_teacher_forced": 3.0, "tau_replay": 3.0, "tau_decoded": 4.0, "num_decoded": 0,
        "slot_acceptance": [], "accept_len": 2.0, "loss": 1.0, "accuracy": 0.5, "lossless": None, "tau_table": [],
    }  # fmt: skip
    monkeypatch.setattr("jaxdraft.evaluate.evaluate_draft", lambda *_, **__: dict(summary))
    monkeypatch.setattr("jaxdraft.cli.load_config", lambda _: config)
    command = [
        "--config",
        "any",
        "--draft",
        "d",
        "--output",
        str(tmp_path / "e.json"),
        "--target-step",
        "10",
        "--draft-step",
        "2",
    ]
    assert main([*command, "--verify-step", "14"]) == 0
    assert "expected speed-up at these step times: 2.50" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["expected_speedup"] == 2.5

    def paid_for(*_, **__):
        raise AssertionError

    monkeypatch.setattr("jaxdraft.evaluate.evaluate_draft", paid_for)
    nowhere = ["--output", str(tmp_path / "none" / "e.json")]
    for more, message in (
        ([], "give all three"),
        (["--verify-step", "0"], "--verify-step=0.0 must be positive"),
        (["--verify-step", "14", *nowhere], "--output=.*/none/e.json cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*command, *more])


def test_refuses_a_draft_of_another_target(config, directory, tmp_path):
    tensors, draft = load_draft(directory)
    other = dataclasses.replace(draft, rope_theta=1e4)
    text = json.loads((TINY / "target" / "config.json").read_text())["text_config"]
    text["rope_parameters"]["rope_theta"] = 1e4
    export_draft(tensors, other, text, tmp_path / "draft")
    with pytest.raises(ValueError, match=r"rope_theta=10000\.0 is not the target's 10000000\.0"):
        evaluate_draft(tmp_path / "draft", config, Console(quiet=True))


def test_the_command_needs_a_draft():
    with pytest.raises(ValueError, match="required: --draft"):
        main(["--config", "tiny_qwen35vl.py"])
    with pytest.raises(ValueError, match=r"draft=.nowhere. has no config\.json"):
        main(["--config", "tiny_qwen35vl.py", "--draft", "nowhere"])


@pytest.mark.parametrize(("module", "work"), [(evaluate, "evaluate_draft"), (check, "check_draft")])
def test_jax_is_set_up_as_in_training(module, work, config, directory, monkeypatch):
    """Its share of a GPU beside the bridge, and no CUDA graphs, which cannot read slots: before the first array."""
    found = {}

    def stop(*_, **__):
        found.update({name: os.environ.get(name) for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_FLAGS")})
        raise ValueError("that is all")

    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # puts back what is set
    monkeypatch.setattr(module, work, stop)
    options = ["--config", "tiny_qwen35vl.py", "--draft", str(directory), "--trainer.memory-fraction", "0.6"]
    with pytest.raises(ValueError, match="that is all"):
        module.main(options)
    assert found["XLA_CLIENT_MEM_FRACTION"] == "0.6"
    assert "--xla_gpu_enable_command_buffer=" in found["XLA_FLAGS"].split()


def test_the_bridge_starts_beside_a_trainer_that_has_its_share(config, directory, monkeypatch):
    """Else the bridge is told of memory as free that JAX takes afterwards."""
    seen = []

    def start(*_, **__):
        seen.append("bridge")
        raise ValueError("that is all")

    monkeypatch.setattr(held_out, "claim_gpu_memory", seen.extend)
    monkeypatch.setattr(held_out, "open_bridge", start)
    draft, target = load_draft(directory)[1], open_target(config.target)
    held = open_held_out(directory, draft, target, config, log_name="evaluate.log")
    with pytest.raises(ValueError, match="that is all"):
        held.__enter__()
    assert seen == [jax.local_devices()[0], "bridge"]

"""The whole way of a draft on one GPU by the README's commands: trained, checked, evaluated, exported, converted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import gpu_runs
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.gpu

STEPS, SAVED = (24, 8) if gpu_runs.REHEARSAL else (240, 80)
DECODING = ("--num-decode", "8", "--max-new-tokens", "24" if gpu_runs.REHEARSAL else "64")


class Trained(NamedTuple):
    out: Path
    output: str

    @property
    def run_dir(self) -> Path:
        return self.out / "journey"

    @property
    def draft(self) -> Path:
        return self.run_dir / "export"

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("journey")
    steps = ("--max-steps", STEPS, "--save-interval", SAVED, "--eval-interval", STEPS // 2)
    readers = ("--bridge.reader-processes", "None")  # as many as a run has by default
    return Trained(out, gpu_runs.train(out, "journey", *steps, *readers, *DECODING).end())


@pytest.fixture(scope="module")
def afterwards(trained):
    """The commands that take a draft, run beside each other and ended, by name."""
    run, out, target = trained.run_dir, trained.out, runs.TINY / "target"
    held_out = ("--draft", trained.draft, "--config", run)
    latest = ("--checkpoint", run, "--step", "latest", "--output", out / "again")
    there = ("--draft", trained.draft, "--target", target, "--output", out / "there", "--format", "speculators")
    commands = {
        "check": gpu_runs.Command("check", *held_out, out=out),
        "evaluate": gpu_runs.Command("evaluate", *held_out, "--output", out / "evaluation.json", out=out),
        "export": gpu_runs.Command("export", *latest, out=out),
        "there": gpu_runs.Command("convert", *there, out=out),
    }
    commands["there"].communicate()
    back = ("--draft", out / "there", "--target", target, "--output", out / "back")
    commands["back"] = gpu_runs.Command("convert", *back, out=out)
    for command in commands.values():
        command.communicate()
    return commands


def test_training_goes_through_its_first_checkpoint_to_its_end(trained, note):
    output, summary = trained.output, trained.summary
    checked = [line for line in output.splitlines() if "this checkpoint's export is the draft in training" in line]
    assert len(checked) == 1, output[-3000:]
    assert checked[0].startswith(f"step {SAVED}: ")
    gpu_runs.assert_learns(trained.run_dir, STEPS)
    assert summary["steps"] == STEPS
    assert summary["target_backend"].startswith(gpu_runs.BACKEND)
    assert gpu_runs.REHEARSAL or "(cuda)" in summary["target_backend"]
    assert gpu_runs.REHEARSAL or re.search(r"embedding and head, .*: mapped from the bridge", output), output
    assert any(bucket["name"] == "one picture" for bucket in summary["tau_table"]), summary["tau_table"]
    note(f"{summary['target_backend']}; {checked[0]}")


def test_decoding_gives_the_targets_own_text(trained, note):
    summary = trained.summary
    assert summary["lossless"] is True
    assert summary["num_decoded"] == 8
    assert "token for token the target's own greedy output" in trained.output
    names = ("tau_teacher_forced", "tau_replay", "tau_decoded", "tau_decoded_first", "near_ties")
    note(", ".join(f"{name} {summary.get(name)}" for name in names))


def verdicts(output: str) -> dict[str, str]:
    """Of the table of `jaxdraft.check`, by system."""
    cells = ([cell.strip() for cell in line.split("│")] for line in output.splitlines() if line.startswith("│"))
    return {cell[1]: cell[2] for cell in cells}


def test_check_finds_the_same_draft_in_every_system(afterwards, note):
    note(afterwards["check"].output[-3000:])
    output = afterwards["check"].end()
    found = verdicts(output)
    assert [found.get(name) for name in ("files", "jax", "torch")] == ["same"] * 3, output
    # A peer that is not installed on this machine was not shown; one that is has to agree.
    assert found["sglang"] == ("same" if gpu_runs.BACKEND == "sglang" else "not run"), output
    assert {found["z-lab"], found["specforge"]} <= {"same", "not installed"}, output


def test_evaluate_finds_what_the_run_found(trained, afterwards, note):
    afterwards["evaluate"].end()
    found, own = json.loads((trained.out / "evaluation.json").read_text()), trained.summary
    names = ("tau_teacher_forced", "tau_replay", "tau_decoded", "lossless", "num_decoded", "loss")
    note(", ".join(f"{name} {found[name]}" for name in names))
    for name in names[:-1]:
        assert found[name] == own[name], (name, found[name], own[name])
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-5)


def tensors(directory: Path) -> dict[str, bytes]:
    from jaxdraft.convert import load_draft

    return {name: np.asarray(tensor).tobytes() for name, tensor in load_draft(directory)[0].items()}


def test_exported_and_converted_drafts_have_the_same_bits(trained, afterwards):
    for name in ("export", "there", "back"):
        afterwards[name].end()
    expected = tensors(trained.draft)
    for name in ("again", "there", "back"):
        assert tensors(trained.out / name) == expected, name


def test_the_exported_tensors_are_those_that_were_evaluated(trained):
    """`as_served`, compiled here, against what the export wrote by way of numpy: a GPU's compiler loses roundings."""
    import jax

    from jaxdraft.checkpoint import load_params
    from jaxdraft.convert import load_draft
    from jaxdraft.evaluate import as_served
    from jaxdraft.model.tensors import to_tensors

    assert gpu_runs.REHEARSAL or jax.default_backend() == "gpu"
    exported, draft = load_draft(trained.draft)
    params, meta = load_params(trained.run_dir, "latest")
    assert meta["step"] == STEPS
    served, trained_with = (to_tensors(x, draft) for x in (as_served(params), params))
    assert served.keys() == exported.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(np.asarray(served[name]), np.asarray(tensor, np.float32), err_msg=name)
    assert any((np.asarray(trained_with[name]) != np.asarray(served[name])).any() for name in exported), "no rounding"

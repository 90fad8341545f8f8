"""A trainer that is killed, and a bridge that is killed: the losses and weights of a run that was left alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import gpu_runs
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.gpu

STEPS, SAVED, KILLED = (20, 4, 9) if gpu_runs.REHEARSAL else (300, 40, 130)
# Heads of 64: the kernels of the block attention run, too.
ARGUMENTS = ("--max-steps", STEPS, "--save-interval", SAVED, "--eval-interval", STEPS // 2, "--draft.head-dim", "64")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(directory, output) of a run that is left alone. The others find its compiled programs."""
    out = tmp_path_factory.mktemp("interruptions")
    return out, gpu_runs.train(out, "calm", *ARGUMENTS).end()


class Killed(NamedTuple):
    """What was seen of a trainer that was killed, of the one after it, and of a run whose bridge was killed."""

    family: int  # processes of the trainer, itself included
    owners_before: set[int]  # of them, those that nvidia-smi showed
    owners_after: set[int]
    last_step: int
    code: int
    resumed: gpu_runs.Command
    disturbed: gpu_runs.Command


@pytest.fixture(scope="module")
def killed(calm):
    out, _ = calm
    struck = gpu_runs.train(out, "struck", *ARGUMENTS)
    disturbed = gpu_runs.train(out, "disturbed", *ARGUMENTS, "--bridge.restarts", "1")
    runs.wait_for_step(struck, out / "struck", KILLED)
    family = gpu_runs.family(struck.pid)
    before = gpu_runs.gpu_owners().keys() & {one.pid for one in family}
    os.kill(struck.pid, signal.SIGKILL)
    struck.communicate()
    gpu_runs.wait_until_gone(family)
    after = gpu_runs.gpu_owners().keys() & {one.pid for one in family}
    last_step = max(runs.metrics(out / "struck"))

    runs.wait_for_step(disturbed, out / "disturbed", KILLED)
    os.kill(runs.wait_for_bridge(disturbed), signal.SIGKILL)
    resumed = gpu_runs.train(out, "struck", *ARGUMENTS)
    for command in (disturbed, resumed):
        command.communicate()
    return Killed(len(family), before, after, last_step, struck.poll(), resumed, disturbed)


def assert_same_run(run_dir: Path, calm_dir: Path) -> None:
    """Losses of every step, held-out figures and weights, to the last bit."""
    from jaxdraft.checkpoint import load_params

    for split in ("train", "eval"):
        ours, theirs = runs.metrics(run_dir, split), runs.metrics(calm_dir, split)
        assert list(ours) == list(theirs)
        for step in theirs:
            for name in ("loss", "accuracy", "tau", "accept_len"):
                assert ours[step][name] == theirs[step][name], (split, step, name)
    (params, meta), (expected, expected_meta) = load_params(run_dir), load_params(calm_dir)
    assert meta["step"] == expected_meta["step"] == STEPS
    for name in expected:
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(expected[name]), err_msg=name)


def test_a_run_that_is_left_alone(calm):
    out, output = calm
    gpu_runs.assert_learns(out / "calm", STEPS)
    assert gpu_runs.REHEARSAL or "attention mosaic" in output, output[:3000]


def test_a_killed_trainer_leaves_nothing_on_the_gpu(killed, note):
    """Its bridge and the processes of that end with it, and the driver has their memory back."""
    assert killed.code == -signal.SIGKILL
    assert SAVED < KILLED <= killed.last_step < STEPS
    assert killed.family >= 2
    seen = f"{len(killed.owners_before)} of its {killed.family} processes held memory of the GPU"
    note(
        f"killed after step {killed.last_step}; {seen}"
        if killed.owners_before
        else "nvidia-smi shows no processes here"
    )
    assert killed.owners_after == set()


def test_the_same_command_ends_as_a_run_that_was_left_alone(calm, killed):
    out, _ = calm
    output = killed.resumed.end()
    assert f"resuming from step {killed.last_step // SAVED * SAVED}" in output or "resuming from step" in output
    assert_same_run(out / "struck", out / "calm")


def test_training_goes_on_with_another_bridge(calm, killed, note):
    out, _ = calm
    output = killed.disturbed.end()
    assert "was killed by SIGKILL" in output, output[-3000:]
    assert "(0 restarts left)" in output
    again = [line for line in output.splitlines() if "embedding and head after the bridge's restart" in line]
    assert gpu_runs.REHEARSAL or [line.endswith("mapped from the bridge") for line in again] == [True], output
    note("; ".join(again))
    assert_same_run(out / "disturbed", out / "calm")

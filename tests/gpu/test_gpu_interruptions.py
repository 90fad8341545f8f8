"""A trainer that is killed, and a bridge that is killed: the losses and weights of a run that was left alone."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import gpu_runs
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.gpu

STEPS, SAVED, KILLED = (20, 4, 9) if gpu_runs.REHEARSAL else (500, 50, 120)
# Heads of 64: the kernels of the block attention run, too.
ARGUMENTS = ("--max-steps", STEPS, "--save-interval", SAVED, "--eval-interval", STEPS // 2, "--draft.head-dim", "64")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(directory, output) of a run that is left alone. The others find its compiled programs."""
    out = tmp_path_factory.mktemp("interruptions")
    return out, gpu_runs.train(out, "calm", *ARGUMENTS).end()


class Killed(NamedTuple):
    """What was seen of a trainer that was killed."""

    code: int
    last_step: int
    family: int  # processes of the trainer, itself included
    owners_before: set[int]  # of them, those that nvidia-smi shows
    owners_after: set[int]


def kill_trainer(out: Path) -> tuple[Killed, gpu_runs.Command]:
    """A run that is killed, and the same command again, ended."""
    struck = gpu_runs.train(out, "struck", *ARGUMENTS)
    runs.wait_for_step(struck, out / "struck", 1)
    family = gpu_runs.family(struck.pid)
    pids = {one.pid for one in family}
    before = gpu_runs.gpu_owners().keys() & pids  # takes a moment, in which it trains on
    runs.wait_for_step(struck, out / "struck", KILLED)
    os.kill(struck.pid, signal.SIGKILL)
    struck.communicate()
    gpu_runs.wait_until_gone(family)
    after = gpu_runs.gpu_owners().keys() & pids
    killed = Killed(struck.poll(), max(runs.metrics(out / "struck")), len(pids), before, after)
    resumed = gpu_runs.train(out, "struck", *ARGUMENTS)
    resumed.communicate()
    return killed, resumed


def kill_bridge(out: Path) -> gpu_runs.Command:
    """A run whose bridge is killed, ended."""
    disturbed = gpu_runs.train(out, "disturbed", *ARGUMENTS, "--bridge.restarts", "1")
    runs.wait_for_step(disturbed, out / "disturbed", KILLED)
    os.kill(runs.wait_for_bridge(disturbed), signal.SIGKILL)
    disturbed.communicate()
    return disturbed


@pytest.fixture(scope="module")
def interrupted(calm):
    """(what was seen of the killed trainer, the one after it, the run whose bridge was killed)."""
    out, _ = calm
    with ThreadPoolExecutor(2) as pool:  # at the same time
        trainer, bridge = pool.submit(kill_trainer, out), pool.submit(kill_bridge, out)
    return *trainer.result(), bridge.result()


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


def test_a_killed_trainer_leaves_nothing_on_the_gpu(interrupted, note):
    """Its bridge and the processes of that end with it, and the driver has their memory back."""
    killed, _, _ = interrupted
    assert killed.code == -signal.SIGKILL
    assert SAVED < KILLED <= killed.last_step < STEPS
    assert killed.family >= 2
    seen = f"nvidia-smi showed {len(killed.owners_before)} of its {killed.family} processes before, none after"
    note(f"killed after step {killed.last_step}; {seen}")
    assert killed.owners_after == set()


def test_the_same_command_ends_as_a_run_that_was_left_alone(calm, interrupted, note):
    out, _ = calm
    _, resumed, _ = interrupted
    (line,) = [line for line in resumed.end().splitlines() if line.startswith("resuming from step ")]
    note(line)
    assert_same_run(out / "struck", out / "calm")


def test_training_goes_on_with_another_bridge(calm, interrupted, note):
    out, _ = calm
    _, _, disturbed = interrupted
    output = disturbed.end()
    assert "was killed by SIGKILL" in output, output[-3000:]
    assert "(0 restarts left)" in output
    again = [line for line in output.splitlines() if "embedding and head after the bridge's restart" in line]
    assert gpu_runs.REHEARSAL or [line.endswith("mapped from the bridge") for line in again] == [True], output
    note("; ".join(again))
    assert_same_run(out / "disturbed", out / "calm")

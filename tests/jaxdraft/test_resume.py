"""A killed run, started again by the same command, ends with the losses and weights of one that was never killed."""

from __future__ import annotations

import signal

import numpy as np
import psutil
import pytest
import runs

from jaxdraft.checkpoint import load_params


@pytest.fixture(scope="module", params=["huggingface", "sglang"])
def baseline(request, tmp_path_factory):
    """A run without interruption: (directory, config, backend)."""
    directory = runs.write_data(tmp_path_factory.mktemp(f"baseline-{request.param}"))
    config = runs.write_config(directory)
    code, output = runs.run(config, "--target.backend", request.param, JAX_LOG_COMPILES="1")
    assert code == 0, output[-3000:]
    return directory, config, request.param, output


def assert_same_run(run_dir, baseline_dir):
    for split in ("train", "eval"):
        ours, theirs = runs.metrics(run_dir, split), runs.metrics(baseline_dir, split)
        assert list(ours) == list(theirs)
        for step in theirs:
            for name in ("loss", "accuracy", "tau", "accept_len"):
                assert ours[step][name] == theirs[step][name], (split, step, name)
    (params, meta), (expected, expected_meta) = load_params(run_dir), load_params(baseline_dir)
    assert meta["step"] == expected_meta["step"] == 9
    for name in expected:
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(expected[name]), err_msg=name)


def test_one_compilation_a_run(baseline):
    _, _, _, output = baseline
    for function in ("train_step", "predict"):
        assert output.count(f"Finished XLA compilation of jit({function})") == 1, function


KILLS = {
    "huggingface": [("trainer", 1), ("bridge", 2), ("trainer", 4), ("trainer", 5), ("bridge", 7), ("trainer", 8)],
    "sglang": [("bridge", 3), ("trainer", 6)],
}


def test_kills_change_nothing(baseline, tmp_path):
    """One run, killed again and again: at each resume it must be where the uninterrupted one was."""
    directory, config, backend, _ = baseline
    args = ["--target.backend", backend, "--output-dir", str(tmp_path)]
    run_dir = tmp_path / "small"
    for victim, step in KILLS[backend]:
        process = runs.start(config, *args)
        bridge = runs.wait_for_bridge(process)
        code, output = runs.kill_at(process, run_dir, step, victim=victim)
        if victim == "trainer":
            assert code == -signal.SIGKILL
        else:
            assert code == 2, output[-2000:]
            assert "error: the feature bridge" in output, output[-2000:]
            assert "Traceback" not in output
        runs.wait_until(lambda bridge=bridge: not psutil.pid_exists(bridge) or runs.is_zombie(bridge))
    code, output = runs.run(config, *args)
    assert code == 0, output[-3000:]
    assert "resuming from step" in output
    assert_same_run(run_dir, directory / "runs" / "small")


def test_sigterm_saves_and_ends_well(baseline, tmp_path):
    directory, config, backend, _ = baseline
    if backend == "sglang":
        pytest.skip("shown with the transformers target: the signal's path does not touch it")
    args = ["--output-dir", str(tmp_path)]
    run_dir = tmp_path / "small"
    code, output = runs.kill_at(runs.start(config, *args), run_dir, 3, victim="trainer", number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    saved = load_params(run_dir)[1]["step"]
    assert 3 < saved < 9
    said = [output.index(f"SIGTERM: {what}") for what in ("saving after this step", f"saved step {saved}")]
    assert said[0] < said[1]
    assert output.index(f"step {saved}/9") < said[1], "the saved step's line comes first"
    assert max(runs.metrics(run_dir)) == saved
    code, output = runs.run(config, *args)
    assert code == 0, output[-3000:]
    assert f"resuming from step {saved}" in output
    assert_same_run(run_dir, directory / "runs" / "small")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--draft.mask-token-id", "1240"), "mask_token_id=1240 differs"),
        (("--draft.num-layers", "2"), "num_layers=2 differs"),
        (("--seed", "1"), "seed=1 differs"),
    ],
)
def test_resume_with_something_else_is_refused(baseline, args, named):
    directory, config, backend, _ = baseline
    if backend == "sglang":
        pytest.skip("shown with the transformers target: the refusal comes before it is used")
    before = load_params(directory / "runs" / "small")[1]
    code, output = runs.run(config, *args)
    assert code == 2
    assert named in output
    assert "--fresh" in output
    assert "Traceback" not in output
    assert load_params(directory / "runs" / "small")[1] == before

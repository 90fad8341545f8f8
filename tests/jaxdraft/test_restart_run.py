"""A run whose bridge is killed and stopped on the way ends as one whose bridge was left alone."""

from __future__ import annotations

import os
import signal

import numpy as np
import runs

from jaxdraft.checkpoint import load_params


def test_a_run_goes_on_with_another_bridge(tmp_path):
    config = runs.write_config(runs.write_data(tmp_path))
    steps = ["--max-steps", "14", "--epochs", "10"]  # three more than are filled ahead when a signal comes
    code, output = runs.run(config, "--name", "calm", *steps)
    assert code == 0, output[-3000:]

    args = ["--name", "disturbed", "--bridge.restarts", "4", "--bridge.request-timeout-s", "10", *steps]
    run_dir = tmp_path / "runs" / "disturbed"
    process = runs.start(config, *args)
    runs.wait_for_step(process, run_dir, 2)
    os.kill(runs.wait_for_bridge(process), signal.SIGKILL)
    # Step 7 comes from a slot that the second bridge has filled: it is up.
    code, output = runs.kill_at(process, run_dir, 7, victim="bridge", number=signal.SIGSTOP)
    assert code == 0, output[-3000:]
    assert "was killed by SIGKILL" in output
    assert "did not answer" in output
    assert "(2 restarts left)" in output

    for split in ("train", "eval"):
        ours, calm = runs.metrics(run_dir, split), runs.metrics(tmp_path / "runs" / "calm", split)
        assert list(ours) == list(calm)
        for step in calm:
            assert ours[step]["loss"] == calm[step]["loss"], (split, step)
    (params, _), (expected, _) = load_params(run_dir), load_params(tmp_path / "runs" / "calm")
    for name in expected:
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(expected[name]), err_msg=name)

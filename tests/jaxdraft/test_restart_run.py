"""A run whose bridge is killed and stopped on the way ends as one whose bridge was left alone."""

from __future__ import annotations

import os
import signal

import numpy as np
import runs

from jaxdraft.checkpoint import load_params


def test_a_run_goes_on_with_another_bridge(tmp_path):
    config = runs.write_config(runs.write_data(tmp_path))
    code, output = runs.run(config, "--name", "calm")
    assert code == 0, output[-3000:]

    args = ["--name", "disturbed", "--bridge.restarts", "4", "--bridge.request-timeout-s", "10"]
    run_dir = tmp_path / "runs" / "disturbed"
    process = runs.start(config, *args)
    runs.wait_until(lambda: 2 in runs.metrics(run_dir) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0][-2000:]
    os.kill(runs.bridge_of(process.pid), signal.SIGKILL)
    code, output = runs.kill_at(process, run_dir, 5, victim="bridge", number=signal.SIGSTOP)
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

"""A bridge's death loses no step that was trained, whoever notices it: a request, a release or an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import runs
from processes import finish, start

from jaxdraft.checkpoint import Checkpoints

TESTS = Path(__file__).resolve().parent.parent


def run(config: Path, out: Path, **env: str) -> tuple[int, str]:
    script = ["-P", TESTS / "fake_training.py", "--config", config, "--output-dir", out]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    ((code, output),) = finish(start(script, devices=1, **cache, **env))
    return code, output


def saved(run_dir: Path) -> tuple[int, dict]:
    """The latest step and its state."""
    with Checkpoints(run_dir, keep=9, read_only=True) as checkpoints:
        return checkpoints.latest, checkpoints.restore_raw(checkpoints.latest)


def test_a_run_whose_bridge_dies_everywhere(tmp_path):
    """Steps of two micro-batches, two slots an evaluation, and no checkpoint but those at a death."""
    body = """config = dataclasses.replace(
        config, max_steps=5, epochs=60, anchors_per_row=6, eval_interval=2, save_interval=100, accumulation=2,
        rows_per_device=4, check_first_checkpoint=False,
        data=dataclasses.replace(config.data, row_tokens=64, eval_rows=5),
        bridge=dataclasses.replace(config.bridge, feature_dtype="float32"))"""
    config = runs.write_config(tmp_path, body)
    code, output = run(config, tmp_path / "calm")
    assert code == 0, output[-3000:]

    out = tmp_path / "disturbed"
    for death, step in (
        ("release:2", 1),  # of step 1's last slot, when step 2 is half done
        ("release:1", 2),  # of step 2's first slot, when it is done and has to be evaluated
        ("__next__:8", 4),  # after the evaluation of step 2 and the slots of steps 3 and 4: the second of an evaluation
    ):
        code, output = run(config, out, KILL_BRIDGE=death)
        assert code == 2, output[-3000:]
        assert "was killed by SIGKILL" in output
        assert saved(out / "small")[0] == step, death
    code, output = run(config, out)
    assert code == 0, output[-3000:]
    assert "resuming from step 4" in output

    for split, steps in (("train", [1, 2, 3, 4, 5]), ("eval", [2, 4, 5])):
        ours, calm = runs.metrics(out / "small", split), runs.metrics(tmp_path / "calm" / "small", split)
        assert list(ours) == list(calm) == steps
        assert [ours[step]["loss"] for step in steps] == [calm[step]["loss"] for step in steps]
    with Checkpoints(out / "small", keep=9, read_only=True) as checkpoints:
        assert all(map(checkpoints.is_rated, [2, 4, 5])), "a later evaluation counts for the best"
    (_, ours), (_, calm) = saved(out / "small"), saved(tmp_path / "calm" / "small")
    for name in ("samples", "tokens", "bad_batches"):
        np.testing.assert_array_equal(ours[name], calm[name], err_msg=name)
    for name in calm["params"]:
        np.testing.assert_array_equal(ours["params"][name], calm["params"][name], err_msg=name)

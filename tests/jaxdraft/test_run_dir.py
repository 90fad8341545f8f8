"""A run's directory: one trainer at a time, and what a signal between two of its moments leaves in it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import runs
from processes import finish, start

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.cli import load_config
from jaxdraft.run import locked
from jaxdraft.signals import Stopped, StopSignal

TESTS = Path(__file__).resolve().parent.parent
BODY = """config = dataclasses.replace(
    config, max_steps=5, epochs=60, anchors_per_row=6, eval_interval=100, save_interval=3, rows_per_device=2,
    data=dataclasses.replace(config.data, row_tokens=64, eval_rows=2),
    bridge=dataclasses.replace(config.bridge, feature_dtype="float32"))"""


def run(directory: Path, *args: str, **env: str) -> tuple[int, str]:
    script = ["-P", TESTS / "fake_training.py", "--config", directory / "small.py", *args]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    ((code, output),) = finish(start(script, devices=1, **cache, **env))
    return code, output


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    runs.write_config(directory, BODY)
    return directory


def test_two_trainers_of_one_run(directory):
    with locked(load_config(str(directory / "small.py")), 0):
        code, output = run(directory, "--fresh")
    assert code == 2
    assert f"the run {directory}/runs/small is trained by another process; wait for it" in output
    assert "Traceback" not in output
    assert not (directory / "runs" / "small").exists()


def test_each_process_of_a_run_keeps_out_its_like(directory):
    config = load_config(str(directory / "small.py"))
    with locked(config, 0), locked(config, 1):
        for index in (0, 1):
            with pytest.raises(ValueError, match="is trained by another process"), locked(config, index):
                pass
    with locked(config, 1):
        pass


def test_a_run_stopped_before_its_first_checkpoint_is_compared_compares_the_next(directory):
    out = ["--output-dir", str(directory / "stopped")]
    code, output = run(directory, *out, "--fresh", SIGNAL=f"push:1:{signal.SIGTERM:d}")
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert "saved step 1; the same command without --fresh goes on from there" in " ".join(output.split())
    assert "compared" not in output
    code, output = run(directory, *out, SIGNAL=f"save:3:{signal.SIGKILL:d}")  # saved, and not yet compared
    assert code == -signal.SIGKILL
    assert "resuming from step 1" in output
    # A signal while the last step is saved ends the run, too, and the next start finishes it.
    code, output = run(directory, *out, SIGNAL=f"save:5:{signal.SIGTERM:d}")
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert "resuming from step 3" in output
    assert "compared at step 5" in output
    assert not (directory / "stopped" / "small" / "summary.json").exists()
    code, output = run(directory, *out)
    assert code == 0, output[-3000:]
    assert "compared" not in output
    with Checkpoints(directory / "stopped" / "small", keep=9, read_only=True) as checkpoints:
        assert checkpoints.latest == 5
    # Step 3 was logged before it was saved.
    assert list(runs.metrics(directory / "stopped" / "small")) == [1, 2, 3, 4, 5]


def test_a_complete_run_keeps_its_figures(directory):
    out = ["--output-dir", str(directory / "twice")]
    summaries = []
    for _ in range(2):
        code, output = run(directory, *out)
        assert code == 0, output[-3000:]
        summaries.append(json.loads((directory / "twice" / "small" / "summary.json").read_text()))
    assert summaries[0] == summaries[1]
    assert summaries[0]["rows_per_second"] > 0
    assert output.count("compared") == 0


def test_a_signal_that_comes_too_late_for_the_loop_is_not_lost():
    with StopSignal() as stop:
        stop.deferred = True
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.end_deferral()

"""The loop's log: no host sync, that is, a step's metrics are read only when the next step has been dispatched."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from feature_bridge.contracts import Skip
from jaxdraft.bridges import BridgeError
from jaxdraft.metrics import ProgressBar
from jaxdraft.step_log import SHOWN, StepLog


class Metric:
    """A device array that notes when the host reads it."""

    def __init__(self, value, read: list[int], step: int):
        self.value, self.read, self.step = value, read, step

    def __array__(self, dtype=None, copy=None):
        self.read.append(self.step)
        return np.asarray(self.value, dtype)


def test_metrics_and_slots_are_settled_a_step_late(tmp_path):
    read, released = [], []
    config = SimpleNamespace(max_bad_batches=1, log_interval=1, accumulation=2)
    stream = SimpleNamespace(seconds_waiting=0.0, release=released.append)
    plan, console = SimpleNamespace(total_steps=2), Console(file=io.StringIO())

    def metrics(step):
        names = {name: 1.0 for name in SHOWN} | {"tokens": 3, "bad_batch": False, "bad_rows": [False]}
        return {name: Metric(value, read, step) for name, value in names.items()}

    with StepLog(config, tmp_path, console, plan, stream, first_step=0) as log:
        for micro in range(4):
            slot = SimpleNamespace(filled=micro, rows=[], planned=[((0, 0), ["a sample"])])
            log.push(1 + micro // 2, metrics(micro), slot)
            assert set(read) == set(range(micro))
            assert released == list(range(micro))
    assert released == [0, 1, 2, 3]
    assert log.rows_per_second > 0


def test_every_skipped_sample_is_counted(tmp_path):
    """Those that the index only counts, too, and those of two files of one name."""
    many = [Skip(where=f"data.jsonl:{i}", reason="short") for i in range(3)]
    skips = [*many, Skip(where="...", reason="and 2000 more", count=2000), Skip(where="data.jsonl:0", reason="broken")]
    log = one_step(tmp_path)
    log.note_skips(skips)
    log.note_skips(skips)
    assert log.num_skipped == 2004
    file = tmp_path / "skipped.jsonl"
    assert len(file.read_text().splitlines()) == 5
    with file.open("a") as end:
        end.write('{"where": "half a li')  # a crash
    resumed = one_step(tmp_path)
    assert resumed.num_skipped == 2004
    resumed.note_skips([Skip(where="p.jsonl:1", reason="its picture is gone")])
    assert [json.loads(line)["where"] for line in file.read_text().splitlines()][-2:] == ["data.jsonl:0", "p.jsonl:1"]


def one_step(tmp_path, release=lambda filled: None, *, bad_before=0, console=None, **changed):
    """The log of a run of one step whose metrics are 1, or as `changed`."""
    config = SimpleNamespace(max_bad_batches=1, log_interval=1, accumulation=1)
    stream, plan = SimpleNamespace(seconds_waiting=0.0, release=release), SimpleNamespace(total_steps=1)
    metrics = {name: 1.0 for name in SHOWN} | {"tokens": 3, "bad_batch": False, "bad_rows": [False]} | changed
    console = console or Console(file=io.StringIO())
    with StepLog(config, tmp_path, console, plan, stream, first_step=0, bad_batches=bad_before) as log:
        log.push(1, metrics, SimpleNamespace(filled=0, rows=[], planned=[((0, 0), ["a sample"])]))
    return log


def written(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_ratio_without_anything_to_divide_by_is_null(tmp_path):
    """No block is supervised to its end, or the whole batch was refused: the run goes on."""
    console = Console(file=io.StringIO(), width=200)
    empty = {"tau": math.nan, "loss": math.inf, "slot_accuracy": np.asarray([0.5, math.nan])}
    one_step(tmp_path, console=console, **empty)
    (line,) = written(tmp_path)
    assert (line["tau"], line["loss"], line["slot_accuracy"]) == (None, None, [0.5, None])
    assert "loss -  teacher-forced tau -" in console.file.getvalue()


def test_the_screen_shows_means_of_the_steps_since_its_last_line():
    console = Console(file=io.StringIO(), width=200)
    with ProgressBar(console, total=5, done=0, log_interval=2) as bar:
        for step, (loss, tau, seconds) in enumerate([(1, 1, 1), (3, None, 3), (8, 2, 1), (6, 3, 1), (4, 2, 2)], 1):
            figures = {"loss": loss, "tau": tau, "seconds": seconds, "rows_per_second": 4 / seconds}
            bar.show(step, figures | {"learning_rate": 0.5})
    lines = [line.split("  ") for line in console.file.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0][1:4] == ["loss 2.000", "teacher-forced tau 1.00", "2.00 rows/s"]
    assert lines[1][1:4] == ["loss 7.000", "teacher-forced tau 2.50", "4.00 rows/s"]


def test_the_trainer_has_no_torch(tmp_path):
    """Although tensorboardX would import it where it is installed, as it is here."""
    script = f"""
import pathlib, sys, jaxdraft.train, jaxdraft.metrics
with jaxdraft.metrics.MetricsLog(pathlib.Path({str(tmp_path)!r}), resume_step=0) as log:
    log.write(1, "eval", {{"tau_replay": 2.0}})
assert "torch" not in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_refused_batches_before_a_resume_count(tmp_path):
    assert one_step(tmp_path, bad_before=0, bad_batch=True, bad_rows=[True]).bad_batches == 1
    with pytest.raises(ValueError, match="2 batches with zero or non-finite .* more than max_bad_batches=1"):
        one_step(tmp_path, bad_before=1, bad_batch=True, bad_rows=[True])


def test_a_step_is_written_although_its_bridge_is_gone(tmp_path):
    def release(filled):
        raise BridgeError("it died", kind="died")

    with pytest.raises(BridgeError):
        one_step(tmp_path, release)
    assert [line["step"] for line in written(tmp_path)] == [1]

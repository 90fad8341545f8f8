"""The loop's log: no host sync, that is, a step's metrics are read only when the next step has been dispatched."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from jaxdraft.bridges import BridgeError
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
    assert line["tau"] is None and line["loss"] is None and line["slot_accuracy"] == [0.5, None]
    assert "loss -  tau -" in console.file.getvalue()


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

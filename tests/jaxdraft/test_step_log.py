"""The loop's log: no host sync, that is, a step's metrics are read only when the next step has been dispatched."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
from rich.console import Console

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

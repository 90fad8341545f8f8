"""What follows every step: its metrics are written, its slot is given back, skips and bad batches are counted.

All this happens one step late, so that nothing waits for the device: while it computes step n, the host reads the
metrics of step n-1, which are ready, and only then gives that step's slot back to the bridge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxdraft.config import Config
from jaxdraft.distributed import is_first
from jaxdraft.eval_result import finite
from jaxdraft.features import FeatureStream, Slot
from jaxdraft.metrics import MetricsLog, ProgressBar, read_lines, rewrite_lines
from jaxdraft.report import say
from jaxdraft.run import Plan

SHOWN = ("loss", "accuracy", "slot_accuracy", "tau", "accept_len", "learning_rate", "grad_norm")


class _Pending(NamedTuple):
    step: int
    metrics: Mapping[str, Any]
    slot: Slot
    last: bool  # of its optimizer step


class StepLog:
    """One run's log. Use as a context manager around the loop."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        console: Console,
        plan: Plan,
        stream: FeatureStream,
        *,
        first_step: int,
        bad_batches: int = 0,
    ):
        self._config, self._stream, self._console = config, stream, console
        self._metrics = MetricsLog(run_dir if is_first() else None, resume_step=first_step)
        self._bar = ProgressBar(console, total=plan.total_steps, done=first_step, log_interval=config.log_interval)
        # A picture that vanishes later is noticed by the one process whose row it was in.
        self._skip_file = run_dir / ("skipped.jsonl" if is_first() else f"skipped.{jax.process_index()}.jsonl")
        self._skipped = _read_skips(self._skip_file)
        self._pending: _Pending | None = None
        self._micro = 0
        self._rows = self._tokens = 0  # since the last optimizer step
        self._last_time = time.perf_counter()
        self._last_waited = stream.seconds_waiting
        self.bad_batches = bad_batches  # with those before a resume
        self._rows_done, self._seconds = 0, 0.0  # of training, in this process

    def __enter__(self) -> StepLog:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._bar.__exit__(kind, *exc)
            self._metrics.__exit__(kind, *exc)

    @property
    def num_skipped(self) -> int:
        """Samples left out, when the data was indexed or later (their picture was gone by then)."""
        return sum(self._skipped.values())

    @property
    def rows_per_second(self) -> float | None:
        """Rows per second of this process's training steps, without evaluations; None without a step."""
        return self._rows_done / self._seconds if self._seconds else None

    def push(self, step: int, metrics: Mapping[str, Any], slot: Slot) -> None:
        """Takes over a dispatched micro-batch, and settles the one before it."""
        self._micro = (self._micro + 1) % self._config.accumulation
        before, self._pending = self._pending, _Pending(step, metrics, slot, last=self._micro == 0)
        self._settle(before)  # this one is pending already: where that raises, it can still be settled

    def settle(self) -> None:
        """Waits for the pending micro-batch, writes its metrics, releases its slot.

        Raises:
          BridgeError: the bridge cannot take the slot back; its metrics are written.
          ValueError: more bad batches than `max_bad_batches`.
        """
        before, self._pending = self._pending, None
        self._settle(before)

    def _settle(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        step, metrics, slot, last = pending
        metrics = jax.device_get(metrics)  # ready means that nothing reads the slot any more
        self.note_skips((skip for row in slot.rows for skip in row.skipped), show=True)
        self._note_bad_batch(step, metrics, slot)
        self._rows += sum(bool(samples) for _, samples in slot.planned)
        self._tokens += int(metrics["tokens"])
        if last:
            self._write_step(step, metrics)
        self._stream.release(slot.filled)  # last: a bridge that is gone raises here, and the step was trained

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(step, split, metrics)
        self._last_time, self._last_waited = time.perf_counter(), self._stream.seconds_waiting  # not the step's time

    def _write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        now, waited = time.perf_counter(), self._stream.seconds_waiting
        seconds, waiting = now - self._last_time, waited - self._last_waited
        line = {name: finite(np.asarray(metrics[name], np.float64).tolist()) for name in SHOWN} | {
            "rows_per_second": self._rows / seconds,
            "tokens_per_second": self._tokens / seconds,
            "seconds": seconds,
            "seconds_waiting": waiting,
            "skipped_samples": self.num_skipped,
            "bad_batches": self.bad_batches,
        }
        self._metrics.write(step, "train", line, curves=step % self._config.log_interval == 0)
        self._bar.show(step, line)
        self._rows_done += self._rows
        self._seconds += seconds
        self._rows = self._tokens = 0
        self._last_time, self._last_waited = now, waited

    def note_skips(self, skips: Iterable[Any], *, show: bool = False) -> None:
        """Writes the samples that were left out to skipped.jsonl, each once."""
        # Training and held-out files may have one name, so a place is not enough.
        new = [skip for skip in skips if (skip.where, skip.reason) not in self._skipped]
        if not new:
            return
        with self._skip_file.open("a") as file:
            for skip in new:
                self._skipped[skip.where, skip.reason] = skip.count
                count = {"count": skip.count} if skip.count > 1 else {}
                file.write(json.dumps({"where": skip.where, "reason": skip.reason, **count}) + "\n")
                if show:
                    say(self._console, f"skipped {skip.where}: {skip.reason}")

    def _note_bad_batch(self, step: int, metrics: Mapping[str, Any], slot: Slot) -> None:
        if not metrics["bad_batch"]:
            return
        self.bad_batches += 1
        rows = [row_id for (row_id, _), bad in zip(slot.planned, metrics["bad_rows"], strict=True) if bad]
        what = f"zero or non-finite features in rows {rows}" if rows else "a non-finite loss or gradient"
        say(self._console, f"step {step}: {what}; this batch changed nothing")
        if self.bad_batches > self._config.max_bad_batches:
            raise ValueError(
                f"{self.bad_batches} batches with zero or non-finite features, loss or gradient, more than "
                f"max_bad_batches={self._config.max_bad_batches}; the last was step {step}: {what}; "
                "look at bridge.log, lower optim.learning_rate or raise max_bad_batches"
            )


def _read_skips(file: Path) -> dict[tuple[str, str], int]:
    """Number of samples by place and reason, of the run that goes on."""
    lines = read_lines(file)
    if lines:
        rewrite_lines(file, lines)  # without half a line, to which the next would be added
    return {(line["where"], line["reason"]): line.get("count", 1) for line in lines}

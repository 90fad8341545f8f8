"""Metrics of a run: every step as a line of metrics.jsonl, some in TensorBoard, means of some on the screen.

A resume cuts metrics.jsonl back to the checkpoint's step, so that it reads like that of a run
that was never interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def _summary_writer(directory: Path, **options: Any) -> Any:
    """A `tensorboardX.SummaryWriter`. Hides torch from it: importing torch takes seconds, and no tensor is logged."""
    if hidden := "torch" not in sys.modules:
        sys.modules["torch"] = None  # an import of it fails
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), **options)


class MetricsLog:
    """Writes what happens at each step; nothing without a directory. Use as a context manager."""

    def __init__(self, run_dir: Path | None, *, resume_step: int):
        self._file = self._board = None
        if run_dir is None:
            return
        file = run_dir / "metrics.jsonl"
        self._file = rewrite_lines(file, (line for line in read_lines(file) if line["step"] <= resume_step)).open("a")
        self._board = _summary_writer(run_dir / "tensorboard", purge_step=resume_step + 1, flush_secs=30)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()

    def write(self, step: int, split: str, metrics: Mapping[str, Any], *, curves: bool = True) -> None:
        """One line: {"step", "split", ...}. Lists (a value a slot) become one TensorBoard curve an element.

        `curves`: write these as well; their 20 points of a step take as long as a small draft's launches.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        self._file.flush()
        if not curves:
            return
        for name, value in metrics.items():
            points = {f"/{i}": x for i, x in enumerate(value)} if isinstance(value, (list, tuple)) else {"": value}
            for suffix, number in points.items():
                if isinstance(number, (int, float)):  # None: a ratio that had nothing to divide by
                    self._board.add_scalar(f"{split}/{name}{suffix}", number, step)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What the lines of a JSONL file hold, but not a last one that a crash cut short; nothing without a file."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def rewrite_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """The file with these lines alone, or, after a crash, as it was."""
    scratch = file.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(scratch, file)
    return file


class ProgressBar:
    """Steps done, and averages of `log_interval` steps; without a terminal, a plain line every `log_interval` steps."""

    def __init__(self, console: Console, *, total: int, done: int, log_interval: int):
        self._console, self._total, self._log_interval = console, total, log_interval
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=log_interval)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`metrics` of this one step: None where a ratio had nothing to divide by."""
        self._lines.append(metrics)

        def mean(name: str, form: str) -> str:
            values = [line[name] for line in self._lines if line[name] is not None]
            return format(sum(values) / len(values), form) if values else "-"

        seconds = sum(line["seconds"] for line in self._lines)
        rows = sum(line["seconds"] * line["rows_per_second"] for line in self._lines)
        figures = (
            f"loss {mean('loss', '.3f')}  teacher-forced tau {mean('tau', '.2f')}  {rows / seconds:.2f} rows/s  "
            f"lr {metrics['learning_rate']:.1e}"
        )
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (step % self._log_interval == 0 or step == self._total):
            self._console.print(f"step {step}/{self._total}  {figures}")

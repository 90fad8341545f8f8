"""What belongs to a run besides its training loop: its directory, its meta, the order of its requests."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from feature_bridge.installed import version_of
from jaxdraft import __version__
from jaxdraft.checkpoint import Checkpoints, as_json, check_resume
from jaxdraft.config import CONFIG_FILE, Config
from jaxdraft.data import Schedule, plan_eval
from jaxdraft.distributed import is_first, wait_for_all
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.train_step import StepConfig

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@contextlib.contextmanager
def locked(config: Config, index: int = 0) -> Iterator[None]:
    """Keeps other trainers out of OUTPUT_DIR/NAME; the kernel lets go of it when this process ends, however it does.

    Every process of a run has a lock of its own, by its `index`, and takes it before it joins the others: a second
    start is refused in all of them, and nothing of it reaches the processes of the run that is under way.

    Raises:
      ValueError: another process trains this run, or the directory cannot be written.
    """
    # Beside it: `fresh` moves the directory itself.
    file = config.run_dir.with_name(f".{config.name}.lock" + (f".{index}" if index else ""))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise ValueError(
            f"output_dir={config.output_dir!r} cannot hold the run {config.name} ({error.strerror}); give another"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"the run {config.run_dir} is trained by another process; wait for it, end it, or give another --name"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def open_run_dir(config: Config, draft: DraftConfig) -> Path:
    """OUTPUT_DIR/NAME, created, the config in it; with `fresh`, what was there is moved aside first.

    Raises:
      ValueError: the directory cannot be written, or the run in it was begun with another config or draft.
    """
    run_dir = config.run_dir
    try:
        if config.fresh and run_dir.exists() and is_first():
            run_dir.rename(run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        wait_for_all("directory of the run")
        run_dir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(run_dir, keep=sys.maxsize, read_only=True) as checkpoints:
            if checkpoints.latest is not None:  # now, and not once the bridge has loaded its target
                known = as_json({"config": config, "draft": draft})
                saved = checkpoints.meta(checkpoints.latest)
                check_resume({name: saved[name] for name in known}, known)
        if is_first():  # for `--config RUN`: what the run really had, command line included
            write_json(run_dir / CONFIG_FILE, as_json(dataclasses.replace(config, fresh=False)))
    except OSError as error:
        raise ValueError(
            f"output_dir={config.output_dir!r} cannot hold the run {config.name} ({error.strerror}); give another"
        ) from error
    return run_dir


Rows = Sequence[tuple[int, tuple[int, ...]]]  # (row id, positions of its samples in the split's index)


@dataclass(frozen=True)
class Request:
    """One micro-batch to fill, the rows of all devices."""

    split: str
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """The order in which a run consumes slots: training micro-batches, and held-out rows at every evaluation.

    Both splits share one queue, so that prefetching runs on across an evaluation and can never starve it.
    """

    schedule: Schedule
    eval_rows: tuple[tuple[int, ...], ...]
    rows_per_micro_batch: int
    accumulation: int
    total_steps: int
    eval_interval: int
    save_interval: int

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_micro_batch * self.accumulation

    def saves_after(self, step: int) -> bool:
        return step % self.save_interval == 0 or step == self.total_steps

    def evaluates_after(self, step: int) -> bool:
        return bool(self.eval_rows) and (step % self.eval_interval == 0 or step == self.total_steps)

    def keeps_after(self, step: int) -> bool:
        """Whether there is a checkpoint of this step: every evaluated one is saved as well."""
        return self.evaluates_after(step) or self.saves_after(step)

    @property
    def eval_requests(self) -> tuple[Request, ...]:
        return tuple(Request("eval", rows) for rows in self._micro_batches(list(enumerate(self.eval_rows))))

    def step_requests(self, step: int) -> tuple[Request, ...]:
        """The micro-batches of optimizer step `step`, counted from 0."""
        ids = range(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        rows = [(i, self.schedule.row(i)) for i in ids]
        return tuple(Request("train", group) for group in self._micro_batches(rows))

    def requests(self, first_step: int, *, evaluate_first: bool = False) -> Iterator[Request]:
        """Everything from optimizer step `first_step` to the end of the run; with the evaluation before it if asked."""
        if evaluate_first:
            yield from self.eval_requests
        for step in range(first_step, self.total_steps):
            yield from self.step_requests(step)
            if self.evaluates_after(step + 1):
                yield from self.eval_requests

    def _micro_batches(self, rows: Rows) -> Iterator[Rows]:
        """Groups of `rows_per_micro_batch` rows, the last one completed by empty rows."""
        size = self.rows_per_micro_batch
        for start in range(0, len(rows), size):
            group = tuple(rows[start : start + size])
            yield group + tuple((len(rows) + i, ()) for i in range(size - len(group)))


def make_plan(
    config: Config,
    lengths: Int[np.ndarray, " samples"],
    eval_lengths: Int[np.ndarray, " held_out"],
    row_groups: int = 1,
) -> Plan:
    """The plan of a run from the lengths of its samples, in tokens.

    A micro-batch is a slot of each of `row_groups` devices (data x fsdp), or groups of devices that share rows.
    """
    rows = config.rows_per_device * row_groups
    schedule = Schedule(lengths, seed=config.seed, epochs=config.epochs, row_tokens=config.data.row_tokens)
    steps = schedule.num_steps(rows * config.accumulation)
    return Plan(
        schedule=schedule,
        eval_rows=plan_eval(eval_lengths, row_tokens=config.data.row_tokens, max_rows=config.data.eval_rows),
        rows_per_micro_batch=rows,
        accumulation=config.accumulation,
        total_steps=min(steps, config.max_steps or steps),
        eval_interval=config.eval_interval,
        save_interval=config.save_interval,
    )


def step_config(config: Config, *, total_steps: int, keep_narrow: bool = False) -> StepConfig:
    """How the steps of a run compute; `keep_narrow` is for a run on one device."""
    return StepConfig(
        num_anchors=config.num_anchors,
        total_steps=total_steps,
        anchor_rule=config.anchor_rule,
        accumulation=config.accumulation,
        compute_dtype=config.compute_dtype,
        attention=config.attention,
        keep_narrow=keep_narrow,
        float32_gradients=config.float32_gradients,
    )


def run_meta(config: Config, draft: DraftConfig, plan: Plan, ready: Any) -> dict[str, Any]:
    """The meta of every checkpoint, which a resume compares (`checkpoint.check_resume`). `ready`: the bridge's."""
    return as_json(
        {
            "config": config,
            "draft": draft,
            "mask_token_id": draft.mask_token_id,
            "index_digest": ready.indexes["train"].digest,
            "capture": ready.target.capture,
            "backend": ready.target.backend,
            "rows_per_step": plan.rows_per_step,
            "total_steps": plan.total_steps,
            "versions": {"jaxdraft": __version__} | {name: version_of(name) for name in VERSIONED},
        }
    )


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(scratch, file)

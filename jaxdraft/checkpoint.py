"""Orbax v1 checkpoints of a run: saved in the background, the latest, the first and the best kept.

A checkpoint is the train state plus a JSON `meta`: config, draft shape, index digest, mask token, capture meaning. The
row position needs no field of its own: it is the step (see `data.Schedule`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdraft.config import Config
from jaxdraft.losses import default_gamma

# What a resume may change (the rest is refused by name): nothing here alters a loss. Paths may move because the index
# digest says whether the data is the same.
RESUME_MAY_CHANGE = frozenset({
    "name", "output_dir", "fresh", "log_interval", "eval_interval", "save_interval", "keep_checkpoints",
    "max_bad_batches", "check_first_checkpoint", "num_decode", "max_new_tokens", "rows_per_device", "target.path",
    "data.train_path", "data.eval_path",
    "data.eval_rows", "data.num_workers", "data.cache_dir", "bridge.transport", "bridge.num_slots", "bridge.python",
    "bridge.verify", "bridge.cuda_graphs", "bridge.start_timeout_s", "bridge.request_timeout_s",
    "bridge.hang_timeout_s", "bridge.restarts", "bridge.memory_fraction",
    "bridge.devices", "bridge.tensor_parallel", "bridge.reader_processes",
    "bridge.sglang_args.mem_fraction_static", "bridge.sglang_args.max_total_tokens",
    "trainer.memory_fraction", "trainer.map_frozen", "mesh.data", "mesh.fsdp", "mesh.tensor", "draft.init_from",
    "accumulation",
    "distributed.coordinator_address", "distributed.num_processes", "distributed.process_id", "distributed.timeout_s",
})  # fmt: skip


# Of these, what all processes of a run must have alike all the same: else they would wait for each other for ever.
SHARED_BY_PROCESSES = frozenset({
    "eval_interval", "save_interval", "keep_checkpoints", "max_bad_batches", "num_decode",
    "rows_per_device", "accumulation", "data.eval_rows", "mesh.data", "mesh.fsdp", "mesh.tensor",
})  # fmt: skip


class _First:
    """Keeps the run's first checkpoint, the baseline that the last one is compared with."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [i == 0 for i in range(len(checkpoints))]


class _Best:
    """Keeps the checkpoint with the highest held-out tau; `tau`: of a checkpoint, None before its evaluation."""

    def __init__(self, tau: Callable[[Any], float | None]):
        self._tau = tau

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        rated = [(tau, c.step) for c in checkpoints if (tau := self._tau(c)) is not None]
        best = max(rated, default=(None, None))[1]
        return [c.step == best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run directory. Use as a context manager: leaving it waits for the save in progress."""

    def __init__(self, run_dir: Path, *, keep: int, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file at INFO
        policies = ocp.training.preservation_policies
        # Of checkpoints that were evaluated by a later start only: a bridge had died before (`train`).
        self._late_file = run_dir / "late_tau.json"
        self._late: dict[str, float] = json.loads(self._late_file.read_text()) if self._late_file.is_file() else {}
        others = set(threading.enumerate())
        self._checkpointer = ocp.training.Checkpointer(
            run_dir.resolve() / "checkpoints",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self._tau), _First()]),
            cleanup_tmp_directories=not read_only,
        )
        # Without threads that the cleaner itself is starting just now, which cannot be joined yet: it waits for those.
        self._cleaners = {thread for thread in threading.enumerate() if thread.is_alive()} - others

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self._checkpointer.close()
        for thread in self._cleaners:  # Orbax waits for them before a save only; they print a traceback if Python ends
            thread.join()

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def first(self) -> int | None:
        return min((c.step for c in self._checkpointer.checkpoints), default=None)

    @property
    def best(self) -> int | None:
        """Step with the highest held-out tau; None before the first evaluation."""
        return self._best[1]

    @property
    def best_tau(self) -> float | None:
        """The highest held-out tau; None before the first evaluation."""
        return self._best[0]

    @property
    def _best(self) -> tuple[float, int] | tuple[None, None]:
        rated = [(tau, c.step) for c in self._checkpointer.checkpoints if (tau := self._tau(c)) is not None]
        return max(rated, default=(None, None))

    def _tau(self, checkpoint: Any) -> float | None:
        return checkpoint.metrics["tau"] if checkpoint.metrics else self._late.get(str(checkpoint.step))

    def is_rated(self, step: int) -> bool:
        """Whether the checkpoint of this step has a held-out tau."""
        return any(c.step == step and self._tau(c) is not None for c in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, meta: dict[str, Any], *, tau: float | None = None) -> None:
        """Starts saving in the background; waits only for the save before it. A step that is there already is kept, and
        only its tau is noted if it had none."""
        if self.latest is not None and step <= self.latest:
            if tau is not None and not self.is_rated(step):
                self._late[str(step)] = float(tau)
                if jax.process_index() == 0:
                    scratch = self._late_file.with_suffix(".tmp")
                    scratch.write_text(json.dumps(self._late) + "\n")
                    os.replace(scratch, self._late_file)
            return
        metrics = None if tau is None else {"tau": float(tau)}
        self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=meta, force=True)

    def wait(self) -> None:
        self._checkpointer.wait()

    def meta(self, step: int) -> dict[str, Any]:
        return self._checkpointer.metadata(step).custom_metadata

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The train state at `step`, placed as `abstract_state`'s shardings say, whatever mesh it was saved on."""
        return self._checkpointer.load(step, abstract_state)

    def restore_raw(self, step: int) -> dict[str, Any]:
        """The state as nested dicts of numpy arrays, whatever devices saved it, for a reader without an abstract state.

        In a run of several processes all of them must call it, as any other method.
        """
        saved = self._checkpointer.metadata(step).metadata
        return self._checkpointer.load(step, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved))


def _steps(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.is_dir() else []


def pick_step(checkpoints: Checkpoints, which: int | str | None, run_dir: Path) -> int:
    """A step by number, or "latest" (None), "best", "first".

    Raises:
      ValueError: no such checkpoint; lists those there are.
    """
    named = {
        None: checkpoints.latest,
        "latest": checkpoints.latest,
        "first": checkpoints.first,
        "best": checkpoints.best,
    }
    step = named.get(which, which)
    there = _steps(run_dir / "checkpoints")
    if step is None or str(step) not in map(str, there):
        raise ValueError(
            f"{run_dir} has no checkpoint{'' if which is None else f' {which!r} (a number, best, latest or first)'}; "
            f"there are: {', '.join(map(str, there)) or 'none, give the directory of a run'}"
        )
    return int(step)


def load_params(run_dir: str | Path, step: int | str | None = None) -> tuple[Any, dict[str, Any]]:
    """Parameters (nested dict of arrays) and meta of a run's checkpoint; `step` as in `pick_step`.

    Raises:
      ValueError: no such run or checkpoint.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "checkpoints").is_dir():
        raise ValueError(f"{run_dir} has no checkpoints/ folder; give the directory of a run, e.g. runs/NAME")
    with Checkpoints(run_dir, keep=10**6, read_only=True) as checkpoints:
        chosen = pick_step(checkpoints, step, run_dir)
        return checkpoints.restore_raw(chosen)["params"], checkpoints.meta(chosen) | {"step": chosen}


def check_resume(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on from `saved` (a checkpoint's meta) with anything different that changes what is trained.

    Raises:
      ValueError: names the first such field, both values, and the remedy.
    """
    if difference := _difference(_completed(saved), now, RESUME_MAY_CHANGE):
        field, old, new = difference
        raise ValueError(
            f"{field}={new!r} differs from the checkpoint's {old!r}; "
            "restore the old value, or start a new run with --fresh or another --name"
        )


def check_alike(first: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses a process whose meta says that it would train something else than the `first` process of the run.

    Raises:
      ValueError: names the first such field and both values.
    """
    if difference := _difference(first, now, RESUME_MAY_CHANGE - SHARED_BY_PROCESSES):
        field, theirs, own = difference
        raise ValueError(
            f"{field}={own!r} differs from process 0's {theirs!r}; give all processes of a run the same config and data"
        )


def _completed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta`, with the fields of the config that an earlier version did not have at their defaults."""
    try:
        config = msgspec.convert(meta["config"], Config)
    except msgspec.ValidationError:  # fields that are no longer what they were: the comparison names one
        return meta
    return meta | {"config": _flatten(as_json(config)) | _flatten(meta["config"])}


def _difference(old: dict[str, Any], new: dict[str, Any], allowed: Set[str]) -> tuple[str, Any, Any] | None:
    """The first field, by name, that differs and may not, with both values."""
    own = ("versions", "evaluation_due", "unchecked")  # of one checkpoint, not of the run
    old, new = (_with_decay(_flatten({k: v for k, v in meta.items() if k not in own})) for meta in (old, new))
    if old.get("config.loss.kind") == new.get("config.loss.kind") != "dflash":
        allowed = allowed | {"loss.gamma"}  # only that kind reads it
    for name in sorted(old.keys() | new.keys()):
        field = name.removeprefix("config.")
        if field not in allowed and old.get(name) != new.get(name):
            return field, old.get(name), new.get(name)
    return None


def _with_decay(meta: dict[str, Any]) -> dict[str, Any]:
    """A flat meta with the number that `loss.gamma`="auto" means: so it may be written either way."""
    block_size = meta.get("draft.block_size", meta.get("config.draft.block_size"))
    if meta.get("config.loss.gamma") != "auto" or block_size is None:
        return meta
    return meta | {"config.loss.gamma": default_gamma(block_size)}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: list(tree) if isinstance(tree, tuple) else tree}
    return {name: value for key, child in tree.items() for name, value in _flatten(child, f"{prefix}{key}.").items()}


def as_json(value: Any) -> Any:
    """Dataclasses and tuples as what JSON gives back, so that a saved meta compares equal to a fresh one."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: as_json(child) for key, child in value.items()}
    return [as_json(child) for child in value] if isinstance(value, (list, tuple)) else value


def abstract_like(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, for `restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

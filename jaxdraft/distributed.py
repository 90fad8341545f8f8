"""Several processes as one run, on JAX's own distributed runtime; a single process without it.

Who is where comes from `--distributed.*`, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from what
JAX detects by itself: Slurm (srun), Open MPI (mpirun), Kubernetes. JAX's runtime ends all processes when one is lost,
but in a way that names nobody. So each one also keeps a file in OUTPUT_DIR/.NAME.hosts fresh, and watches the others'.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdraft.cli import of_system
from jaxdraft.config import Config, DistributedConfig
from jaxdraft.signals import Stopped, exit_code

_BEAT_S = 0.5


class Place(NamedTuple):
    """The place of this process among all of the run; None: left to JAX's detection."""

    address: str | None
    count: int | None
    index: int | None
    local_count: int | None
    """Processes on this host."""


def find_place(config: DistributedConfig, env: Mapping[str, str]) -> Place | None:
    """Where this process is; None for a run of one process.

    Raises:
      ValueError: one of address, count and index is known and another is not.
    """
    launched = _launched(env)
    if launched is not None and launched.count == 1:
        launched = None
    address = config.coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
    count = _number(config.num_processes, env.get("JAX_NUM_PROCESSES"))
    index = _number(config.process_id, env.get("JAX_PROCESS_ID"))
    if address is count is index is None:
        if launched is not None and not _address_is_detected(env):
            raise ValueError(
                f"a launcher has started {launched.count} processes and JAX cannot find out where the first one is: "
                "set JAX_COORDINATOR_ADDRESS=HOST:PORT for all of them, HOST being that of process 0"
            )
        return launched
    if launched is not None:  # the launcher knows what is not given
        count, index = launched.count if count is None else count, launched.index if index is None else index
    for name, value in (("coordinator_address", address), ("num_processes", count), ("process_id", index)):
        if value is None:
            raise ValueError(f"distributed.{name} is missing where the others are given; set it, or JAX_{name.upper()}")
    return None if count == 1 else Place(address, count, index, launched and launched.local_count)


def _launched(env: Mapping[str, str]) -> Place | None:
    """What the variables of srun, mpirun or an indexed job of Kubernetes say."""
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        local = int(tasks[0]) if tasks else None
        return Place(None, int(env.get("SLURM_NTASKS", "1")), int(env["SLURM_PROCID"]), local)
    if "OMPI_COMM_WORLD_SIZE" in env:
        local = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0")) or None
        return Place(None, int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"]), local)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return Place(None, None, int(env["JOB_COMPLETION_INDEX"]), None)
    return None


def _address_is_detected(env: Mapping[str, str]) -> bool:
    """Whether JAX finds process 0 by itself: not with Open MPI 5, which no longer says where it is."""
    return "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_MCA_orte_hnp_uri" in env


def _number(given: int | None, env: str | None) -> int | None:
    return given if given is not None else int(env) if env else None


@contextlib.contextmanager
def joined(config: Config, place: Place | None) -> Iterator[None]:
    """All processes of the run, joined; to be entered before anything asks JAX for a device. `place`: this one's.

    In a run of several processes an error in one ends them all, with exit code 2 and one sentence that names it; so
    does a signal before the first step or after the last; only the process that got it ends with 128 + its number.
    """
    if place is None:
        yield
        return
    timeout = config.distributed.timeout_s
    watch = _Watch(config.run_dir.with_name(f".{config.name}.hosts"), place, timeout)
    try:
        # Its own time-outs come after ours, which name a process: what it says when they pass is a stack trace.
        patience = int(timeout if place.count is None else 2 * timeout + 30)
        with _ctrl_c_ends():  # while it waits for the others Python's own handler would wait, too
            watch.start()
            jax.distributed.initialize(
                coordinator_address=place.address,
                num_processes=place.count,
                process_id=place.index,
                # Where a scheduler starts several processes on a host, JAX gives each the one GPU of its local index.
                local_device_ids=() if place.local_count == 1 else None,
                initialization_timeout=patience,
                heartbeat_timeout_seconds=int(2 * timeout + 30),
            )
        watch.expect(jax.process_count())
        yield
        wait_for_all("end of the run")  # watched: the first one may decode for minutes, and end in an error
        watch.leave("")
        jax.distributed.shutdown()
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(timeout + 10 * _BEAT_S)  # a collective broke off: `_Watch` will say whose fault it is
        known = isinstance(error, (ValueError, RuntimeError, Stopped))
        sentence = str(error) if known else of_system(error)
        known, sentence = sentence is not None, sentence or repr(error)
        if not known and not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        watch.leave(sentence or "an error")
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if place.index == 0:
            time.sleep(3 * _BEAT_S)  # they read why: when JAX's coordinator is gone, JAX ends them with a stack trace
        # (JAX would wait for the others, which wait for this one.)
        os._exit(exit_code(error.number) if isinstance(error, Stopped) else 2)


@contextlib.contextmanager
def _ctrl_c_ends() -> Iterator[None]:
    """Ctrl-C ends the process at once, unless it was started to ignore it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class _Watch:
    """Keeps this process's file fresh, and ends the process when another one's is stale.

    A file counts as fresh when it changes: hosts' clocks differ.
    """

    def __init__(self, directory: Path, place: Place, timeout_s: float):
        self._directory, self._place, self._timeout_s = directory, place, timeout_s
        self._beat, self._name = 0, f"{socket.gethostname()}:{os.getpid()}"
        self._last_words: str | None = None
        self._count = place.count or 0
        self._lock = threading.Lock()

    def start(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._stale: dict[int, str | None] = {}  # of an earlier run
        self.expect(self._count)
        self._write()
        threading.Thread(target=self._run, name="hosts", daemon=True).start()

    def expect(self, count: int) -> None:
        """The number of processes, where it was not known before."""
        self._stale |= {i: self._read(i) for i in range(count) if i != self._place.index and i not in self._stale}
        self._count = count

    def leave(self, last_words: str) -> None:
        """Writes why this process ends; empty: in good order."""
        self._last_words = last_words
        self._write()

    def _file(self, index: int) -> Path:
        return self._directory / str(index)

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._beat += 1
            words = "" if self._last_words is None else self._last_words or "done"
            scratch = self._file(self._place.index).with_suffix(".new")
            scratch.write_text(f"{self._name} {self._beat}\n{words}")
            os.replace(scratch, self._file(self._place.index))

    def _read(self, index: int) -> str | None:
        try:
            return self._file(index).read_text()
        except OSError:
            return None

    def _run(self) -> None:
        seen: dict[int, str | None] = {}
        since: dict[int, float] = {}
        while self._last_words is None:
            time.sleep(_BEAT_S)
            self._write()
            for i, stale in tuple(self._stale.items()):
                text = self._read(i)
                if i not in seen:
                    seen[i], since[i] = stale, time.monotonic()
                if text != seen[i]:
                    seen[i], since[i] = text, time.monotonic()
            fresh = {i: text for i, text in seen.items() if text and text != self._stale[i]}
            for i, text in fresh.items():
                name, _, words = text.partition("\n")
                if words and words != "done":
                    self._end(f"process {i} ({name.split()[0]}) ended: {words}")
            done = {i for i, text in fresh.items() if text.endswith("\ndone")}
            late = [i for i in seen if time.monotonic() - since[i] > self._timeout_s and i not in done]
            if late:
                what = self._describe(late, fresh)
                self._end(f"{what} within distributed.timeout_s={self._timeout_s:g} s; see its log")

    def _describe(self, late: list[int], fresh: dict[int, str]) -> str:
        names = ", ".join(f"{i} ({fresh[i].split()[0]})" if i in fresh else str(i) for i in late)
        what = "gave no sign of life" if all(i in fresh for i in late) else "did not come"
        return f"of the {self._count} processes of this run, process {names} {what}"

    def _end(self, sentence: str) -> None:
        if self._last_words is not None:
            return
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)


def is_first() -> bool:
    """Whether this process speaks for all: prints, writes metrics, exports."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def beside_first(value: Any) -> tuple[Any, Any]:
    """What the first process gave, and this one; JSON, and the same object twice in a run of one process."""
    if jax.process_count() == 1:
        return value, value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    first = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    return json.loads(np.asarray(first, np.uint8).tobytes()), json.loads(text.tobytes())


class Vote:
    """Finds the largest number that any process gave: all get the same answer at the same step, without waiting.

    The devices compute the maximum after the current step, and it is read one step later. A process that is alone gets
    its own number at once.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda votes: votes.max())
        self._cast: jax.Array | None = None

    def largest(self, number: int) -> int:
        """0 where all have given 0."""
        if jax.process_count() == 1:
            return number
        shape = (self._sharding.num_devices,)
        votes = jax.make_array_from_callback(shape, self._sharding, lambda _: np.full(1, number, np.int32))
        before, self._cast = self._cast, self._largest(votes)
        return 0 if before is None else int(before)


def to_host(tree: Any) -> Any:
    """Arrays as numpy ones, whole on every process.

    One at a time: all of them might not fit a device, and the CPU's collectives stand still when many are under way.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: jax.device_get(_replicate(x)), tree)


def _replicate(x: jax.Array) -> jax.Array:
    if x.is_fully_replicated:
        return x
    whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(_identity, out_shardings=whole)(x)


def _identity(x):
    return x


def from_host(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Arrays that every process has, placed on all devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)

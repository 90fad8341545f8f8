"""`python tests/fake_training.py --config FILE ...`: `jaxdraft.train` with bridges of `fake_worker.TrainingWorker`.

DIE_WHILE_SAVING=PROCESS:STEP kills that process once it has written its part of that checkpoint, before the save is
complete. KILL_BRIDGE=METHOD:N kills the bridge before the N-th call of that method of `FeatureStream`.
SIGNAL=METHOD:STEP:NUMBER sends itself a signal when that step has been logged ("push") or saved ("save"). The first
checkpoint is not compared with its export, for which there is no target, but the step is printed.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import jaxdraft.bridges
import jaxdraft.train
from jaxdraft.bridges import BridgeError
from jaxdraft.checkpoint import Checkpoints
from jaxdraft.cli import run_command
from jaxdraft.features import FeatureStream
from jaxdraft.step_log import StepLog


def die_while_saving(fatal_step: int) -> None:
    from orbax.checkpoint.experimental.v1._src.synchronization import multihost

    save, wait_for_all = Checkpoints.save, multihost.sync_global_processes
    saving: list[int] = []

    def noted(self: Checkpoints, step: int, *args: Any, **options: Any) -> None:
        self.wait()  # else the save before this one may still be on its way to its barrier
        saving.append(step)
        save(self, step, *args, **options)

    async def fatal(key: str, **options: Any) -> None:
        if "commit_complete" in key and saving[-1] == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        await wait_for_all(key, **options)

    Checkpoints.save, multihost.sync_global_processes = noted, fatal


def kill_bridge(method: str, number: int) -> None:
    original, calls = getattr(FeatureStream, method), itertools.count(1)

    def fatal(self: FeatureStream, *args: Any) -> Any:
        if next(calls) == number:
            (bridge,) = self._bridges
            os.kill(bridge.pid, signal.SIGKILL)
            bridge._link.process.wait_for_exit(60)
        return original(self, *args)

    setattr(FeatureStream, method, fatal)


def send_at(method: str, fatal_step: int, number: int) -> None:
    kind = {"push": StepLog, "save": Checkpoints}[method]
    original = getattr(kind, method)

    def fatal(self: Any, step: int, *args: Any, **options: Any) -> None:
        original(self, step, *args, **options)
        if step == fatal_step:
            if method == "save":
                self.wait()
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the interpreter looks at signals between two instructions

    setattr(kind, method, fatal)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # of the bridges
    for name in ("connect", "connect_team"):
        start = functools.partial(getattr(jaxdraft.bridges, name), worker="fake_worker:TrainingWorker")
        setattr(jaxdraft.bridges, name, start)
    process, _, step = os.environ.get("DIE_WHILE_SAVING", "").partition(":")
    if step and process == os.environ.get("JAX_PROCESS_ID"):
        die_while_saving(int(step))
    method, _, number = os.environ.get("KILL_BRIDGE", "").partition(":")
    if number:
        kill_bridge(method, int(number))
    method, _, when = os.environ.get("SIGNAL", "").partition(":")
    if when:
        send_at(method, *map(int, when.split(":")))
    jaxdraft.train.check_first = lambda *_: "compared"
    jaxdraft.train.report.print_check = lambda _, step, same: print(f"{same} at step {step}", flush=True)
    run_command(jaxdraft.train.main, BridgeError)

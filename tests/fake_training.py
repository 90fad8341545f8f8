"""`python tests/fake_training.py --config FILE ...`: `jaxdraft.train` with bridges of `fake_worker.TrainingWorker`.

DIE_WHILE_SAVING=PROCESS:STEP kills that process once it has written its part of that checkpoint, before the save is
complete. KILL_BRIDGE=METHOD:N kills the bridge before the N-th call of that method of `FeatureStream`.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import jaxdraft.bridges
from jaxdraft.bridges import BridgeError
from jaxdraft.checkpoint import Checkpoints
from jaxdraft.cli import run_command
from jaxdraft.features import FeatureStream
from jaxdraft.train import main


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
    run_command(main, BridgeError)

"""`python tests/fake_training.py --config FILE ...`: `jaxdraft.train` with bridges of `fake_worker.TrainingWorker`.

DIE_WHILE_SAVING=PROCESS:STEP kills that process once it has written its part of that checkpoint, before the save is
complete.
"""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import jaxdraft.bridges
from jaxdraft.bridges import BridgeError
from jaxdraft.checkpoint import Checkpoints
from jaxdraft.cli import run_command
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


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # of the bridges
    for name in ("connect", "connect_team"):
        start = functools.partial(getattr(jaxdraft.bridges, name), worker="fake_worker:TrainingWorker")
        setattr(jaxdraft.bridges, name, start)
    process, _, step = os.environ.get("DIE_WHILE_SAVING", "").partition(":")
    if step and process == os.environ.get("JAX_PROCESS_ID"):
        die_while_saving(int(step))
    run_command(main, BridgeError)

"""`python tests/fake_training.py --config FILE ...`: `jaxdraft.train` with bridges of `fake_worker.TrainingWorker`."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jaxdraft.features
from jaxdraft.cli import run_command
from jaxdraft.features import BridgeError
from jaxdraft.train import main

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # of the bridges
    jaxdraft.features.connect = functools.partial(jaxdraft.features.connect, worker="fake_worker:TrainingWorker")
    run_command(main, BridgeError)

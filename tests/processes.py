"""Processes that end with the test that started them; Python scripts as those of one run, joined on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

_started: list[subprocess.Popen] = []


def popen(command: Sequence[Any], env: Mapping[str, str]) -> subprocess.Popen:
    """`command` with `env` besides the environment; its output is read by `communicate`."""
    command, env = [*map(str, command)], os.environ | env
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _started.append(process)
    return process


def end_all() -> None:
    """Kills what `popen` has started and still runs, with its descendants: a bridge has a process group of its own."""
    for process in _started:
        if process.poll() is None:
            root = psutil.Process(process.pid)
            for one in (root, *root.children(recursive=True)):  # the root first: it may start a bridge again
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
        process.stdout.close()
    _started.clear()


def start(
    script: Sequence[Any], *, devices: int, processes: int = 1, only: int | None = None, **env: str
) -> list[subprocess.Popen]:
    """Starts `python SCRIPT ARGUMENTS..` in each process, `devices` of them in each; `only`: this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        popen([sys.executable, *script], common | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}) | env)
        for index in (range(processes) if only is None else [only])
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str]]:
    """Exit code and output of each, all of them ended."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]

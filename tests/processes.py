"""Python scripts as the processes of one run, joined on loopback, with virtual CPU devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


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
        subprocess.Popen(
            [sys.executable, *map(str, script)],
            env=os.environ | common | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}) | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (range(processes) if only is None else [only])
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and output of each, all of them ended."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]

"""SGLang's HTTP server as a process: started, waited for, stopped for a while, ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

from benchmarks.journey.notes import StageError, end_tree, start, why
from benchmarks.journey.settings import Flags, Journey, server_flags

START_S = 300.0
STAND_IN = "benchmarks.journey.stand_in"  # of a machine without a GPU, where SGLang's own server is too slow


class Server:
    """One server. `wait` before it is used, `end` whatever happens."""

    def __init__(self, journey: Journey, name: str, port: int, more: Flags):
        self.url, self.name, self._journey = f"http://127.0.0.1:{port}", name, journey
        self._began, self._log = time.monotonic(), f"server-{name}"
        if journey.quick:
            command = [sys.executable, "-m", STAND_IN, "--port", str(port)]
        else:
            command = [journey.server_python, "-m", "sglang.launch_server", "--model-path", str(journey.model)]
            command += ["--port", str(port), *server_flags(journey, more)]
        self._process = start(journey, self._log, command)

    def wait(self) -> float:
        """Waits until it answers; the seconds since it was started. Raises StageError: it ended, or never answers."""
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=20) as reply:
                if reply.status == 200:
                    return time.monotonic() - self._began
            if (code := self._process.poll()) is not None:
                raise StageError(f"the server ended with exit code {code}; {why(self._journey, self._log)}")
            if time.monotonic() - self._began > START_S:
                raise StageError(f"the server does not answer after {START_S:.0f} s; {why(self._journey, self._log)}")
            time.sleep(0.2)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """All its processes stand still meanwhile, and leave the processors and the GPU to another one."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for one in (root, *root.children(recursive=True)):
                one.send_signal(number)

    def end(self) -> None:
        end_tree(self._process)


@contextlib.contextmanager
def servers(journey: Journey, wanted: Sequence[tuple[str, Flags]]) -> Iterator[list[Server]]:
    """Servers that start side by side; (name, flags) of each."""
    ports, found = free_ports(len(wanted)), []
    try:
        for (name, more), port in zip(wanted, ports, strict=True):
            found.append(Server(journey, name, port, more))
        yield found
    finally:
        for server in found:
            server.end()


def free_ports(number: int) -> list[int]:
    """Ports far apart: SGLang takes others above its own, up to 10,000 further."""
    ports, port = [], 21000
    while len(ports) < number:
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                port += 37
                continue
        ports.append(port)
        port += 2000
    return ports

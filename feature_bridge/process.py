"""The bridge process as its parent sees it: starting, watching and ending it, and describing how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from feature_bridge.logs import quote_file

_POLL_S = 0.02


class BridgeProcess:
    """Leads a process group: Ctrl-C in the trainer's terminal does not reach it, and a kill reaches its children."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        document: bytes,
        log_path: Path,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ):
        """Starts `command` with `document` on its standard input and the files `pass_fds` open.

        Its output is appended to `log_path`.

        Raises:
          ValueError: the interpreter cannot be run.
        """
        self.log_path = log_path
        self.killed = False  # by a signal; `describe_end` finds it out
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(env, log_path.parent),
                    process_group=0,  # in the trainer's session: the kernel then wakes a stopped one when that dies
                    pass_fds=pass_fds,
                )
            except OSError as error:
                raise ValueError(
                    f"bridge.python={command[0]!r} cannot be run ({error.strerror}); "
                    "give the path of a Python interpreter"
                ) from error
        # A broken pipe: it has ended already, which whoever waits for it finds out.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(document)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """After `kill`: negative for the signal that ended it."""
        return self._process.returncode

    def has_exited(self) -> bool:
        """Leaves an ended process as a zombie, so that its id, and its group's, stay its own until `kill`."""
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # SIGCHLD is ignored here, so the kernel has forgotten it already
            return True

    def cpu_seconds(self) -> float | None:
        """Seconds of CPU time that the process has used; None: it runs right now, or waits for a core or a disk."""
        ticks = 0
        for task in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # a thread that has just ended
                state, *fields = task.read_text().rpartition(")")[2].split()
                if state in "RD":
                    return None
                ticks += int(fields[10]) + int(fields[11])  # utime, stime: proc_pid_stat(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait_for_exit(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (exited := self.has_exited()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return exited

    def kill(self) -> None:
        """Ends what is left of the process and of its children."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def describe_end(self, patience_s: float) -> str:
        """How it ended and the error in its log, as a clause. It gets `patience_s` seconds to end by itself."""
        by_itself = self.wait_for_exit(patience_s)
        self.kill()
        code = self._process.returncode
        self.killed = by_itself and code < 0
        if not by_itself:
            end = "closed its connection"
        elif code >= 0:
            end = f"ended with exit code {code}"
        else:
            end = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                end += " (often the kernel's, out of memory)"
        return f"{end}; {quote_file(self.log_path, self._log_start)}"


def _environment(extra: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The trainer's environment and `extra`, made so that `-m feature_bridge.server` is found and is this very code.

    What is installed beside this package would clash with the bridge's own packages: so an installed one is shown by a
    link that is alone in a folder of `directory`.
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", **extra}
    package = Path(__file__).resolve().parent
    root = package.parent
    if root.name in ("site-packages", "dist-packages"):
        # Hosts that share `directory` may have it elsewhere.
        root = directory.resolve() / f".python-{hashlib.sha256(bytes(package)).hexdigest()[:12]}"
        root.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (root / package.name).symlink_to(package, target_is_directory=True)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    return env

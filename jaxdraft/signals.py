"""SIGTERM and SIGINT end a run after the current step, or at once if there is nothing to save or on a second signal."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHERS_S = 5.0  # one SIGTERM may come twice: launchers send it to a process and to all that they have started


def exit_code(number: int) -> int:
    """The exit code of a run that a signal ended early, as shells count: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + number


class Stopped(KeyboardInterrupt):
    """A signal ended the run where there was nothing to save."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignal:
    """Use as a context manager, on the main thread. `number` is that of the signal received, 0 before.

    A thread answers on stderr, and ends the process at the second signal: the main thread may be in XLA's compiler for
    minutes, where Python's own handlers wait.
    """

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False
        """True while training: the loop looks at `number` and saves. Otherwise a signal raises `Stopped`."""
        self.outcome = "nothing was trained yet"
        """What the user is told of a run that is stopped while nothing is deferred."""

    def end_deferral(self) -> None:
        """From now on a signal raises `Stopped`; so does one that came too late for the loop to see it."""
        self.deferred = False
        if self.number:
            raise Stopped(self.number)

    @property
    def received(self) -> str | None:
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> StopSignal:
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
        self._thread.start()
        self._old: dict[int, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._old_fd = signal.set_wakeup_fd(self._outbox.fileno())
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._outbox.close()
        self._thread.join()
        self._inbox.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            return
        self.number = number
        if not self.deferred:
            raise Stopped(number)

    def _answer(self) -> None:
        first = None  # when it came
        while byte := self._inbox.recv(1):  # the interpreter writes each signal's number, whatever its threads do
            if byte[0] not in SIGNALS:
                continue
            if first is not None:
                if byte[0] == signal.SIGTERM and time.monotonic() - first < LAUNCHERS_S:
                    continue
                os._exit(exit_code(byte[0]))
            first = time.monotonic()
            what = "saving after this step; once more ends at once" if self.deferred else f"stopped; {self.outcome}"
            print(f"{signal.Signals(byte[0]).name}: {what}", file=sys.stderr, flush=True)

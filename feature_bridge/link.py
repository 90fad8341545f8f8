"""A bridge process and the connection to it: starting it, hearing from it, and explaining its end."""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from feature_bridge import wire
from feature_bridge.contracts import BridgeSpec, Failure, Ping, Pong
from feature_bridge.cuda_ipc import require_gpu
from feature_bridge.process import BridgeProcess

_POLL_S = 0.1  # while waiting: how often to look whether the process is alive
_PING_S = 1.0  # while waiting: how often to ask for a sign of life
_IDLE = 0.2  # share of a core: a process that uses less counts as idle
_PEER_EXIT_S = 1.0  # after a broken collective, how long to wait for the rank that broke it to end
_EXIT_S = 2.0  # how long a bridge that closed its connection may take to end by itself


class BridgeError(RuntimeError):
    """The bridge could not do what was asked; one sentence.

    kind: "refused", it cannot run this spec; "failed", it could not do one request, the others are fine; "died", the
    process is gone; "timeout", no answer in time.
    """

    def __init__(self, message: str, *, kind: Literal["refused", "failed", "died", "timeout"]):
        super().__init__(message)
        self.kind = kind

    @property
    def retryable(self) -> bool:
        """The same requests may succeed with a new bridge: nothing that the user wrote is wrong."""
        return self.kind in ("died", "timeout")


def launch(
    spec: BridgeSpec,
    *,
    log_path: str | Path,
    python: str | None,
    env: Mapping[str, str] | None,
    worker: str | None,
    name: str = "the feature bridge",
) -> Link:
    """Starts a bridge process, which says that it is ready once its index and its target are there.

    Arguments and errors are those of `connect`; `name` is for the user.
    """
    assert spec.transport != "in_process"
    if spec.transport == "cuda_ipc":
        require_gpu("the trainer")
    ours, theirs = socket.socketpair()  # no name, so that nobody else finds it and nothing of it is ever left
    with theirs:
        command = [python or sys.executable, "-m", "feature_bridge.server", "--fd", str(theirs.fileno())]
        command += ["--worker", worker] if worker else []
        try:
            process = BridgeProcess(
                command,
                document=wire.dump_spec(spec),
                log_path=Path(log_path),
                env=env or {},
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
    return Link(process, wire.Connection(ours), name)


class Link:
    """A bridge process and the connection to it."""

    def __init__(self, process: BridgeProcess, connection: wire.Connection, name: str):
        self.process, self.connection, self.name = process, connection, name
        self.hang_timeout_s = math.inf  # while it starts, which compilers and imports may hold up
        self.ready = False
        self._early: deque[Any] = deque()  # what it said while another rank was waited for
        self.peers: Sequence[Link] = ()  # other ranks of its target: it cannot go on without them

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._cause(self._died()) from error

    def receive(self, deadline: float) -> Any | None:
        """The next message; None at the deadline.

        Raises:
          BridgeError: "refused" or "died", of this process or of a peer; "timeout", it hangs.
        """
        silence = self._silence()
        of_peers = {peer: peer._silence() for peer in self.peers}
        while True:
            try:
                message = self._next(min(_POLL_S, deadline - time.monotonic()))
            except BridgeError as error:
                raise self._cause(error) from error
            if isinstance(message, Pong):
                silence = self._silence()
                continue
            if message is not None:
                return message
            next(silence)
            for peer in self.peers:
                if peer.process.has_exited():
                    raise peer._cause(peer.last_words())
                if peer.ready:  # this one may wait for it, in a collective
                    if peer._listen():
                        of_peers[peer] = peer._silence()
                    next(of_peers[peer])
            if time.monotonic() >= deadline:
                return None

    def _silence(self) -> Iterator[None]:
        """Advance it while nothing is heard: it asks for signs of life, and raises BridgeError when they do not come.

        A bridge that is late because the machine is busy, or because it computes under the interpreter's lock, does not
        hang. Silence counts only while the process is stopped or all its threads sleep.
        """
        silent, before, looked, used = 0.0, time.monotonic(), time.monotonic(), self.process.cpu_seconds()
        period, pinged = min(_PING_S, self.hang_timeout_s / 4), False
        while silent < self.hang_timeout_s:
            yield
            now = time.monotonic()
            silent, before = silent + min(now - before, _PING_S), now  # this process may have been stopped as well
            if now - looked >= period:
                last, used = used, self.process.cpu_seconds()
                if last is None or used is None or used - last > _IDLE * (now - looked):
                    silent = 0.0
                looked = now
                if self.hang_timeout_s < math.inf and not pinged:  # once: unread ones would fill the socket
                    pinged = True
                    with contextlib.suppress(OSError):  # it has ended, which `receive` finds out
                        self.connection.send(Ping())
        raise BridgeError(
            f"{self.name} (process {self.process.pid}) did not answer and did nothing for {self.hang_timeout_s:g} s: "
            f"it hangs (see {self.process.log_path}); raise bridge.hang_timeout_s if it only sleeps",
            kind="timeout",
        )

    def _listen(self) -> bool:
        """Whether it said anything; messages are kept for `receive`."""
        waiting, self._early = self._early, deque()
        try:
            message = self._next(0)
        finally:
            self._early = waiting
        if message is not None and not isinstance(message, Pong):
            self._early.append(message)
        return message is not None

    def last_words(self) -> BridgeError:
        """The error that says how the process ended; only after its end."""
        try:
            while True:
                self._next(0)
        except BridgeError as error:
            return error

    def _next(self, timeout: float) -> Any | None:
        """The next message, if there is one in time."""
        if self._early:
            return self._early.popleft()
        exited = self.process.has_exited()  # asked first: its last words may still be in the socket
        try:
            message = self.connection.receive(0 if exited else timeout)
        except EOFError as error:
            raise self._died() from error
        if isinstance(message, Failure) and message.request_id is None:
            prefix = f"{self.name}: " if self.peers else ""
            raise BridgeError(f"{prefix}{message.message}", kind="refused")
        if message is None and exited:
            raise self._died()
        return message

    def _died(self) -> BridgeError:
        how = self.process.describe_end(_EXIT_S)
        return BridgeError(f"{self.name} (process {self.process.pid}) {how}", kind="died")

    def _cause(self, error: BridgeError) -> BridgeError:
        """The error to raise: what the ranks that died say, killed ones first; if none died, what all of them say."""
        deadline = time.monotonic() + _PEER_EXIT_S
        while self.peers and time.monotonic() < deadline and not any(p.process.has_exited() for p in self.peers):
            time.sleep(_POLL_S)
        ended = [peer for peer in self.peers if peer.process.has_exited()]
        said = [(self, error), *((peer, peer.last_words()) for peer in ended)]
        said.sort(key=lambda words: not words[0].process.killed)  # whoever ended by itself may have missed that one
        # Who refuses a request breaks the others' collective; while they start, a death makes the others refuse.
        telling = "refused" if self.ready and not any(link.process.killed for link, _ in said) else "died"
        chosen = [words for _, words in said if words.kind == telling] or [words for _, words in said]
        return BridgeError("; ".join(map(str, chosen)), kind=chosen[0].kind)


@contextlib.contextmanager
def killed_on_error(links: Sequence[Link]) -> Iterator[None]:
    """Kills the processes of `links` if the block raises."""
    try:
        yield
    except BaseException:
        for link in links:
            link.process.kill()
        raise

"""What the trainer holds: a running bridge. Imports neither jax nor torch.

The client is single-threaded: it reads the socket only while the trainer waits for an answer. In between, answers wait
in the kernel: they are small, for what is large lies in the slots.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from feature_bridge import wire
from feature_bridge.contracts import (
    BridgeSpec,
    Check,
    Checked,
    Decode,
    Decoded,
    Dtype,
    Failure,
    Fill,
    Filled,
    Ready,
    Release,
    RingMemory,
    Row,
    SharedWeights,
    Shutdown,
)
from feature_bridge.cuda_ipc import require_gpu
from feature_bridge.memory import Producer, attach_memory
from feature_bridge.process import BridgeProcess
from feature_bridge.weights import MappedWeights

_POLL_S = 0.1  # how often whoever waits looks whether the process is alive
_EXIT_S = 2.0  # how long a bridge that closed its connection may take to end by itself
_MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes


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


def connect(
    spec: BridgeSpec,
    *,
    log_path: str | Path,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    start_timeout_s: float = 1800.0,
    request_timeout_s: float = 300.0,
    worker: str | None = None,
) -> Client:
    """Starts a bridge process and waits until it is ready.

    Args:
      spec: what it runs.
      log_path: file that its output is appended to.
      python: its interpreter, of another virtual environment say; None: this one.
      env: environment variables, beside the trainer's own.
      start_timeout_s: seconds that it may take to be ready, the index and the target included.
      request_timeout_s: seconds that filling one slot may take.
      worker: "module:Class" of another worker, for tests.

    Raises:
      BridgeError: "refused", "died" or "timeout".
      ValueError: `python` cannot be run, the transport is not there, or the bridge is of another version.
    """
    assert spec.transport != "in_process"
    if spec.transport == "cuda_ipc":
        require_gpu("the trainer")
    deadline = time.monotonic() + start_timeout_s
    with _listen() as (listener, socket_path):
        command = [python or sys.executable, "-m", "feature_bridge.server", "--socket", socket_path]
        command += ["--worker", worker] if worker else []
        process = BridgeProcess(command, document=wire.dump_spec(spec), log_path=Path(log_path), env=env or {})
        with _killed_on_error(process):
            connection = _accept(listener, process, deadline)
    with _killed_on_error(process):
        return Client(spec, process, connection, deadline, request_timeout_s)


class Client:
    """A running bridge process, made by `connect`."""

    def __init__(
        self,
        spec: BridgeSpec,
        process: BridgeProcess,
        connection: wire.Connection,
        deadline: float,
        request_timeout_s: float,
    ):
        """Waits for `Ready` until `deadline` (of the monotonic clock)."""
        self._process = process
        self._connection = connection
        self._request_timeout_s = request_timeout_s
        self._request_id = 0
        self._ended = False
        self._fills: deque[int] = deque()  # request ids of fills that `next_filled` has not answered yet
        self._answers: dict[int, Filled | Decoded | Checked | Failure] = {}  # that came before they were asked for
        self.num_slots = spec.num_slots
        self.transport = spec.transport
        self.ready = self._start_message(Ready, deadline)
        shown = self._start_message(RingMemory, deadline)
        self.ring_bytes = shown.num_bytes
        self._memory = attach_memory(
            spec.transport,
            spec.slot_layout(self.ready.feature_width),
            spec.num_slots,
            shown,
            connection.take_fd,
        )
        self._weights = MappedWeights(self._start_message(SharedWeights, deadline))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def life(self) -> int:
        """See `RestartingClient.life`."""
        return 0

    @property
    def exit_code(self) -> int | None:
        """Of the closed bridge; negative for the signal that ended it."""
        return self._process.exit_code

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        """Asks for a slot with these rows, and returns the request's id at once."""
        request = Fill(request_id=self._new_id(), split=split, rows=tuple(rows))
        self._send(request)
        self._fills.append(request.request_id)
        return request.request_id

    def next_filled(self, timeout: float | None = None) -> Filled:
        """Waits for the oldest fill that was not answered yet: answers come in the order of the requests.

        Args:
          timeout: seconds; None: request_timeout_s of `connect`.

        Raises:
          BridgeError: "failed" for this request alone; "died" or "timeout".
        """
        assert self._fills, "no fill is under way"
        self._wait_for(self._fills[0], self._request_timeout_s if timeout is None else timeout)
        return self._take(self._fills.popleft())

    def slot(self, filled: Filled, device_id: int | None = None) -> dict[str, Producer]:
        """The slot's arrays by field name, on JAX's local device `device_id`; to be read until `release`."""
        return self._memory.arrays(filled.slot, device_id)

    def release(self, slot: int, generation: int) -> None:
        """Gives a slot back: nothing may read its arrays any more. Late or repeated, it changes nothing."""
        self._send(Release(slot=slot, generation=generation))

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        """The target's "embedding" and "head" in the bridge's own GPU memory, until `close_weights`.

        Raises:
          ValueError: they cannot be mapped, and why.
        """
        return self._weights.arrays(device_id)

    def close_weights(self) -> None:
        """Unmaps what `weights` gave: nothing may read it any more."""
        self._weights.close()

    def decode(
        self,
        draft_path: str,
        samples: Sequence[int],
        max_new_tokens: int,
        timeout: float = math.inf,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Decoded:
        """Decodes held-out conversations with an exported draft; its turn comes after the fills asked for before.

        Raises:
          BridgeError: as `next_filled`.
        """
        request = Decode(
            request_id=self._new_id(),
            draft_path=draft_path,
            samples=tuple(samples),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        self._send(request)
        self._wait_for(request.request_id, timeout)
        return self._take(request.request_id)

    def check(
        self,
        draft_path: str,
        inputs_path: str,
        systems: Sequence[str],
        embedding_dtype: Dtype,
        timeout: float = math.inf,
    ) -> Checked:
        """Runs the blocks of a file through the systems that load a draft; queued and failing as `decode` does."""
        request = Check(
            request_id=self._new_id(),
            draft_path=draft_path,
            inputs_path=inputs_path,
            systems=tuple(systems),
            embedding_dtype=embedding_dtype,
        )
        self._send(request)
        self._wait_for(request.request_id, timeout)
        return self._take(request.request_id)

    def close(self, grace_s: float = 5.0) -> None:
        """Ends the bridge: in good order within `grace_s` seconds, else by force. A second call does nothing.

        First wait for whatever reads a slot: afterwards the arrays that are left read zeros.
        """
        self.end(grace_s)
        self.close_weights()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def end(self, grace_s: float = 5.0) -> None:
        """Ends the process as `close` does and keeps the memory: slots may be read until `close`."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(OSError):
            self._connection.send(Shutdown())
        self._process.wait_for_exit(grace_s)
        self._process.kill()
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- inside ---

    def _new_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise _died(self._process) from error

    def _start_message(self, cls: type, deadline: float) -> Any:
        message = self._receive(deadline)
        if message is None:
            raise BridgeError(
                f"the feature bridge was not ready in time (see {self._process.log_path}); raise "
                "bridge.start_timeout_s if its index or its target needs longer",
                kind="timeout",
            )
        assert isinstance(message, cls)
        return message

    def _wait_for(self, request_id: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while request_id not in self._answers:
            message = self._receive(deadline)
            if message is None:
                raise BridgeError(
                    f"the feature bridge did not answer request {request_id} within {timeout:g} s (see "
                    f"{self._process.log_path}); raise bridge.request_timeout_s if its target needs longer",
                    kind="timeout",
                )
            self._answers[message.request_id] = message

    def _take(self, request_id: int) -> Any:
        answer = self._answers.pop(request_id)
        if isinstance(answer, Failure):
            raise BridgeError(answer.message, kind="failed")
        return answer

    def _receive(self, deadline: float) -> Any | None:
        """The next message; None at the deadline."""
        while True:
            exited = self._process.has_exited()  # asked first: its last words may still be in the socket
            try:
                message = self._connection.receive(0 if exited else min(_POLL_S, deadline - time.monotonic()))
            except EOFError as error:
                raise _died(self._process) from error
            if isinstance(message, Failure) and message.request_id is None:
                raise BridgeError(message.message, kind="refused")
            if message is not None:
                return message
            if exited:
                raise _died(self._process)
            if time.monotonic() >= deadline:
                return None


def _died(process: BridgeProcess) -> BridgeError:
    return BridgeError(f"the feature bridge (process {process.pid}) {process.describe_end(_EXIT_S)}", kind="died")


@contextlib.contextmanager
def _killed_on_error(process: BridgeProcess) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.kill()
        raise


@contextlib.contextmanager
def _listen() -> Iterator[tuple[socket.socket, str]]:
    """A listening Unix socket, mode 0600, in a directory of its own, mode 0700.

    Both are gone as soon as the bridge has connected: no name is left that another process could find.
    """
    parent = tempfile.gettempdir()
    if len(parent) + len("/bridge-12345678/socket") > _MAX_SOCKET_PATH:
        parent = "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="bridge-", dir=parent))  # mkdtemp makes it 0700
    path = directory / "socket"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            os.chmod(path, 0o600)
            listener.listen(1)
            yield listener, str(path)
    finally:
        path.unlink(missing_ok=True)
        directory.rmdir()


def _accept(listener: socket.socket, process: BridgeProcess, deadline: float) -> wire.Connection:
    listener.settimeout(_POLL_S)
    while True:
        exited = process.has_exited()
        with contextlib.suppress(TimeoutError):
            return wire.Connection(listener.accept()[0])
        if exited:
            raise _died(process)
        if time.monotonic() >= deadline:
            raise BridgeError(
                f"the feature bridge did not connect in time (see {process.log_path}); raise bridge.start_timeout_s",
                kind="timeout",
            )

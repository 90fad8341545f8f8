"""The trainer's end of a bridge process. Imports neither jax nor torch.

The client is single-threaded: it reads the socket only while the trainer waits for an answer. In between, answers wait
in the kernel: they are small, for what is large lies in the slots.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_bridge.bridge import Bridge
from feature_bridge.contracts import (
    BridgeSpec,
    Check,
    Checked,
    Decode,
    Decoded,
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
from feature_bridge.link import BridgeError, Link, killed_on_error, launch
from feature_bridge.memory import Producer, attach_memory
from feature_bridge.weights import MappedWeights

__all__ = ["BridgeError", "Client", "connect"]


def connect(
    spec: BridgeSpec,
    *,
    log_path: str | Path,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    start_timeout_s: float = 1800.0,
    request_timeout_s: float = 300.0,
    hang_timeout_s: float = 4.0,
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
      hang_timeout_s: seconds that it may be silent and idle once it is ready.
      worker: "module:Class" of another worker, for tests.

    Raises:
      BridgeError: "refused", "died" or "timeout".
      ValueError: `python` cannot be run, the transport is not there, or the bridge is of another version.
    """
    deadline = time.monotonic() + start_timeout_s
    link = launch(spec, log_path=log_path, python=python, env=env, worker=worker)
    with killed_on_error([link]):
        return Client(spec, link, deadline, request_timeout_s, hang_timeout_s)


class Client(Bridge):
    """A bridge process, made by `connect`."""

    def __init__(
        self,
        spec: BridgeSpec,
        link: Link,
        deadline: float,
        request_timeout_s: float,
        hang_timeout_s: float,
    ):
        """Waits for `Ready` until `deadline` (of the monotonic clock)."""
        self._link = link
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
            link.connection.take_fd,
        )
        self._weights = MappedWeights(self._start_message(SharedWeights, deadline))
        link.hang_timeout_s, link.ready = hang_timeout_s, True
        link.connection.spin = spec.transport == "cuda_ipc"  # from now on answers come by the tenth of a second

    @property
    def pid(self) -> int:
        return self._link.process.pid

    @property
    def exit_code(self) -> int | None:
        """The closed bridge's exit code; negative for the signal that ended it."""
        return self._link.process.exit_code

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        request = Fill(request_id=0, split=split, rows=tuple(rows))
        self._fills.append(self.send(request))
        return self._fills[-1]

    def next_filled(self, timeout: float | None = None) -> Filled:
        """See `Bridge.next_filled`; `timeout` None: request_timeout_s of `connect`."""
        assert self._fills, "no fill is under way"
        self._wait_for(self._fills[0], self._request_timeout_s if timeout is None else timeout)
        return self._take(self._fills.popleft())

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        assert rank == 0
        return self._memory.arrays(filled.slot, device_id)

    def release(self, slot: int, generation: int) -> None:
        self._link.send(Release(slot=slot, generation=generation))

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        """See `Bridge.weights`; mapped until `close_weights`."""
        return self._weights.arrays(device_id)

    def close_weights(self) -> None:
        """Unmaps what `weights` gave: nothing may read it any more."""
        self._weights.close()

    def ask(self, request: Decode | Check, timeout: float) -> Decoded | Checked:
        return self.answer(self.send(request), timeout)

    def send(self, request: Fill | Decode | Check) -> int:
        """Sends a request under an id of its own, and returns that, for `answer`."""
        self._request_id += 1
        self._link.send(replace(request, request_id=self._request_id))
        return self._request_id

    def answer(self, request_id: int, timeout: float) -> Any:
        """Waits for a request's answer; raises as `next_filled`."""
        self._wait_for(request_id, timeout)
        return self._take(request_id)

    def close(self, grace_s: float = 5.0) -> None:
        """See `Bridge.close`.

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
        self.ask_to_end()
        self._ended = True
        self._link.process.wait_for_exit(grace_s)
        self._link.process.kill()
        self._link.connection.close()

    def ask_to_end(self) -> None:
        """The first half of `end`."""
        if not self._ended:
            with contextlib.suppress(OSError):
                self._link.connection.send(Shutdown())

    # --- inside ---

    def _start_message(self, cls: type, deadline: float) -> Any:
        message = self._link.receive(deadline)
        if message is None:
            raise BridgeError(
                f"{self._link.name} was not ready in time (see {self._link.process.log_path}); raise "
                "bridge.start_timeout_s if its index or its target needs longer (the index continues where it stopped)",
                kind="timeout",
            )
        assert isinstance(message, cls)
        return message

    def _wait_for(self, request_id: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while request_id not in self._answers:
            message = self._link.receive(deadline)
            if message is None:
                raise BridgeError(
                    f"{self._link.name} did not answer request {request_id} within {timeout:g} s (see "
                    f"{self._link.process.log_path}); raise bridge.request_timeout_s if its target needs longer",
                    kind="timeout",
                )
            self._answers[message.request_id] = message

    def _take(self, request_id: int) -> Any:
        answer = self._answers.pop(request_id)
        if isinstance(answer, Failure):
            raise BridgeError(answer.message, kind="failed")
        return answer

"""What the trainer holds: a running bridge. Imports neither jax nor torch.

The client is single-threaded: it reads the socket only while the trainer waits for an answer. In between, answers wait
in the kernel: they are small, for what is large lies in the slots.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


class Client:
    """A running bridge process, made by `connect`."""

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
        self.num_ranks = 1  # see `team.Team`
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
        link.hang_timeout_s = hang_timeout_s
        link.connection.spin = spec.transport == "cuda_ipc"  # from now on answers come by the tenth of a second

    @property
    def pid(self) -> int:
        return self._link.process.pid

    @property
    def life(self) -> int:
        """See `RestartingClient.life`."""
        return 0

    @property
    def exit_code(self) -> int | None:
        """Of the closed bridge; negative for the signal that ended it."""
        return self._link.process.exit_code

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        """Asks for a slot with these rows, and returns the request's id at once."""
        request = Fill(request_id=self._new_id(), split=split, rows=tuple(rows))
        self._link.send(request)
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

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        """The slot's arrays by field name, on JAX's local device `device_id`; to be read until `release`."""
        assert rank == 0
        return self._memory.arrays(filled.slot, device_id)

    def release(self, slot: int, generation: int) -> None:
        """Gives a slot back: nothing may read its arrays any more. Late or repeated, it changes nothing."""
        self._link.send(Release(slot=slot, generation=generation))

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
        self, draft_path: str, samples: Sequence[int], max_new_tokens: int, timeout: float = math.inf, **sampling: Any
    ) -> Decoded:
        """Decodes held-out conversations with an exported draft; its turn comes after the fills asked for before.

        `sampling`: the temperature (0: greedily) and the seed.

        Raises:
          BridgeError: as `next_filled`.
        """
        return self.answer(self.ask_decode(draft_path, samples, max_new_tokens, **sampling), timeout)

    def check(
        self,
        draft_path: str,
        inputs_path: str,
        systems: Sequence[str],
        embedding_dtype: Dtype,
        timeout: float = math.inf,
    ) -> Checked:
        """Runs the blocks of a file through the systems that load a draft; queued and failing as `decode` does."""
        return self.answer(self.ask_check(draft_path, inputs_path, systems, embedding_dtype), timeout)

    def ask_decode(
        self,
        draft_path: str,
        samples: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> int:
        """The request of `decode`, for `answer`."""
        request = Decode(
            request_id=self._new_id(),
            draft_path=draft_path,
            samples=tuple(samples),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        self._link.send(request)
        return request.request_id

    def ask_check(self, draft_path: str, inputs_path: str, systems: Sequence[str], embedding_dtype: Dtype) -> int:
        """The request of `check`, for `answer`."""
        request = Check(
            request_id=self._new_id(),
            draft_path=draft_path,
            inputs_path=inputs_path,
            systems=tuple(systems),
            embedding_dtype=embedding_dtype,
        )
        self._link.send(request)
        return request.request_id

    def answer(self, request_id: int, timeout: float) -> Any:
        """Waits for a request's answer; raises as `next_filled`."""
        self._wait_for(request_id, timeout)
        return self._take(request_id)

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

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- inside ---

    def _new_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def _start_message(self, cls: type, deadline: float) -> Any:
        message = self._link.receive(deadline)
        if message is None:
            raise BridgeError(
                f"{self._link.name} was not ready in time (see {self._link.process.log_path}); raise "
                "bridge.start_timeout_s if its index or its target needs longer (an index goes on where it was)",
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

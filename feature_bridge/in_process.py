"""The bridge without a process, for debugging: a worker that lives in the trainer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from feature_bridge.bridge import Bridge
from feature_bridge.client import BridgeError
from feature_bridge.contracts import BridgeSpec, Check, Checked, Decode, Decoded, Fill, Filled, Row
from feature_bridge.memory import Producer, create_host_memory
from feature_bridge.ring import Ring
from feature_bridge.server import Worker, begin_fill, describe


class InProcessClient(Bridge):
    """A slot is filled when it is waited for, on the trainer's own thread; so no time-out applies."""

    def __init__(self, spec: BridgeSpec, worker: Worker):
        self.ready = worker.ready
        self.num_slots = spec.num_slots
        self.transport = spec.transport
        self._spec = spec
        self._worker = worker
        self._ring = Ring(spec.num_slots)
        self._memory, fd = create_host_memory(spec.slot_layout(self.ready.feature_width), spec.num_slots)
        os.close(fd)
        self.ring_bytes = self._memory.num_bytes
        self._request_id = 0
        self._fills: deque[Fill] = deque()

    @property
    def pid(self) -> int:
        return os.getpid()

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        self._request_id += 1
        self._fills.append(Fill(request_id=self._request_id, split=split, rows=tuple(rows)))
        return self._request_id

    def next_filled(self, timeout: float | None = None) -> Filled:
        request = self._fills.popleft()
        lease = self._ring.acquire(timeout=0)  # one thread: to wait for a release would be to wait for ever
        try:
            complete = begin_fill(self._worker, self._ring, lease, self._memory, request, self._spec.rows_per_request)
            return complete()
        except Exception as error:
            raise BridgeError(describe(error), kind="failed") from error

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        return self._memory.arrays(filled.slot, device_id)

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        return dict(self._worker.weights())

    def release(self, slot: int, generation: int) -> None:
        self._ring.release(slot, generation)

    def ask(self, request: Decode | Check, timeout: float) -> Decoded | Checked:
        self._request_id += 1
        request = replace(request, request_id=self._request_id)
        try:
            return self._worker.decode(request) if isinstance(request, Decode) else self._worker.check(request)
        except Exception as error:
            raise BridgeError(describe(error), kind="failed") from error

    def close(self, grace_s: float = 0.0) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

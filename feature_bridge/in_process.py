"""The bridge without a process, for debugging: the client's interface over a worker that lives in the trainer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from feature_bridge.client import BridgeError
from feature_bridge.contracts import BridgeSpec, Check, Checked, Decode, Decoded, Dtype, Fill, Filled, Row
from feature_bridge.memory import Producer, create_host_memory
from feature_bridge.ring import Ring
from feature_bridge.server import Worker, describe, fill_slot


class InProcessClient:
    """Same methods as `client.Client`. A slot is filled when it is asked for, on the trainer's own thread."""

    def __init__(self, spec: BridgeSpec, worker: Worker):
        self.ready = worker.ready
        self.num_ranks = 1
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
    def life(self) -> int:
        return 0

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
            return fill_slot(self._worker, self._ring, lease, self._memory, request, self._spec.rows_per_request)
        except Exception as error:
            raise BridgeError(describe(error), kind="failed") from error

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        return self._memory.arrays(filled.slot, device_id)

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        return dict(self._worker.weights())

    def release(self, slot: int, generation: int) -> None:
        self._ring.release(slot, generation)

    def decode(
        self,
        draft_path: str,
        samples: Sequence[int],
        max_new_tokens: int,
        timeout: float | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Decoded:
        self._request_id += 1
        request = Decode(
            request_id=self._request_id,
            draft_path=draft_path,
            samples=tuple(samples),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        try:
            return self._worker.decode(request)
        except Exception as error:
            raise BridgeError(describe(error), kind="failed") from error

    def check(
        self,
        draft_path: str,
        inputs_path: str,
        systems: Sequence[str],
        embedding_dtype: Dtype,
        timeout: float | None = None,
    ) -> Checked:
        self._request_id += 1
        request = Check(
            request_id=self._request_id,
            draft_path=draft_path,
            inputs_path=inputs_path,
            systems=tuple(systems),
            embedding_dtype=embedding_dtype,
        )
        try:
            return self._worker.check(request)
        except Exception as error:
            raise BridgeError(describe(error), kind="failed") from error

    def close(self, grace_s: float = 0.0) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> InProcessClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

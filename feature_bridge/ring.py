"""Slots, generations and leases: the bookkeeping of a ring, without its memory.

    FREE --acquire--> FILLING --publish--> LEASED --release--> FREE
                          \\--cancel--> FREE

Every acquire starts a new generation of its slot. A release names the generation it means, so one that comes late or
twice finds another generation, or no lease, and changes nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    FREE = "free"
    FILLING = "filling"
    LEASED = "leased"


@dataclass(frozen=True)
class Lease:
    """The right to a slot's bytes until its generation ends."""

    slot: int
    generation: int


class RingClosed(Exception):
    """The ring was closed while someone waited for a slot."""


class Ring:
    """Thread-safe. The slot that has been free longest is acquired first."""

    def __init__(self, num_slots: int):
        assert num_slots >= 1
        self._changed = threading.Condition()
        self._states = [State.FREE] * num_slots
        self._generations = [0] * num_slots
        self._free = deque(range(num_slots))
        self._closed = False

    @property
    def num_slots(self) -> int:
        return len(self._states)

    def state(self, slot: int) -> State:
        return self._states[slot]

    def acquire(self, timeout: float | None = None) -> Lease:
        """Waits for a free slot, at most `timeout` seconds (None: no limit), and starts its next generation.

        Raises:
          RingClosed: the ring is closed, now or while waiting.
          TimeoutError: no slot became free.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._free or self._closed, timeout):
                raise TimeoutError("no slot is free")
            if self._closed:
                raise RingClosed
            slot = self._free.popleft()
            self._states[slot] = State.FILLING
            self._generations[slot] += 1
            return Lease(slot, self._generations[slot])

    def publish(self, lease: Lease) -> None:
        """The filled slot passes to the reader."""
        with self._changed:
            assert self._holds(lease, State.FILLING)
            self._states[lease.slot] = State.LEASED

    def cancel(self, lease: Lease) -> None:
        """Filling failed: the slot is free again and was never published."""
        with self._changed:
            assert self._holds(lease, State.FILLING)
            self._free_slot(lease.slot)

    def release(self, slot: int, generation: int) -> bool:
        """The reader is done with this generation. False, and nothing changes, when it does not hold it (any more)."""
        with self._changed:
            if not 0 <= slot < self.num_slots or not self._holds(Lease(slot, generation), State.LEASED):
                return False
            self._free_slot(slot)
            return True

    def close(self) -> None:
        """Whoever waits for a slot, or will, gets `RingClosed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _holds(self, lease: Lease, state: State) -> bool:
        return self._states[lease.slot] is state and self._generations[lease.slot] == lease.generation

    def _free_slot(self, slot: int) -> None:
        self._states[slot] = State.FREE
        self._free.append(slot)
        self._changed.notify()

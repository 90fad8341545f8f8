"""The ring against a model that is told every step, and under threads."""

import threading
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from feature_bridge.ring import Lease, Ring, RingClosed, State


class RingMachine(RuleBasedStateMachine):
    """The model: which leases are being filled, which are published, and how often each slot was acquired."""

    @initialize(num_slots=st.integers(1, 4))
    def start(self, num_slots):
        self.ring = Ring(num_slots)
        self.filling, self.leased = [], []
        self.free = list(range(num_slots))  # longest free first
        self.generations = [0] * num_slots

    @precondition(lambda self: self.free)
    @rule()
    def acquire(self):
        slot = self.free.pop(0)
        self.generations[slot] += 1
        lease = self.ring.acquire(timeout=0)
        assert lease == Lease(slot, self.generations[slot])
        self.filling.append(lease)

    @precondition(lambda self: not self.free)
    @rule()
    def acquire_finds_no_slot(self):
        with pytest.raises(TimeoutError):
            self.ring.acquire(timeout=0)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def publish(self, data):
        lease = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        self.ring.publish(lease)
        self.leased.append(lease)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def cancel(self, data):
        lease = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        self.ring.cancel(lease)
        self.free.append(lease.slot)

    @rule(slot=st.integers(-2, 5), back=st.integers(-1, 3))
    def release(self, slot, back):
        """The right generation, an older, a newer, of slots in any state or none: only a held lease is released."""
        known = 0 <= slot < len(self.generations)
        lease = Lease(slot, self.generations[slot] - back if known else 1)
        held = lease in self.leased
        assert self.ring.release(lease.slot, lease.generation) is held
        if held:
            self.leased.remove(lease)
            self.free.append(slot)

    @invariant()
    def states_agree(self):
        states = {lease.slot: State.FILLING for lease in self.filling}
        states |= {lease.slot: State.LEASED for lease in self.leased}
        states |= dict.fromkeys(self.free, State.FREE)
        assert [self.ring.state(i) for i in range(self.ring.num_slots)] == [states[i] for i in sorted(states)]


TestRing = RingMachine.TestCase


def test_threads_never_share_a_slot():
    """Fillers and a reader at work together: every generation is seen once, and no slot is held twice at a time."""
    ring, per_filler, num_fillers = Ring(3), 400, 3
    published, holders, clashes = [], Counter(), []
    arrived = threading.Condition()

    def filler():
        for i in range(per_filler):
            lease = ring.acquire()
            holders[lease.slot] += 1
            if holders[lease.slot] != 1:
                clashes.append(lease)
            holders[lease.slot] -= 1
            if i % 5 == 0:
                ring.cancel(lease)
                continue
            ring.publish(lease)
            with arrived:
                published.append(lease)
                arrived.notify()

    threads = [threading.Thread(target=filler, daemon=True) for _ in range(num_fillers)]
    for thread in threads:
        thread.start()
    expected = num_fillers * per_filler * 4 // 5
    for seen in range(expected):
        with arrived:
            assert arrived.wait_for(lambda seen=seen: len(published) > seen, timeout=30)
        lease = published[seen]
        assert ring.release(lease.slot, lease.generation)
        assert not ring.release(lease.slot, lease.generation)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not clashes
    assert len(set(published)) == expected


def test_close_wakes_whoever_waits():
    ring, caught = Ring(1), []
    ring.acquire()

    def wait():
        try:
            ring.acquire()
        except RingClosed as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    ring.close()
    thread.join(30)
    assert len(caught) == 1
    with pytest.raises(RingClosed):
        ring.acquire()

"""A bridge that is started again when it dies or hangs.

Requests are pure: the new bridge fills the same rows with the same features. So all unanswered requests are sent again,
in the same order, and the caller only has to wait longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from feature_bridge.bridge import Bridge
from feature_bridge.client import BridgeError, Client
from feature_bridge.contracts import Check, Checked, Decode, Decoded, Filled, Ready, Row
from feature_bridge.cuda_ipc import CudaError
from feature_bridge.memory import Producer
from feature_bridge.team import Team

_LIFE = 1 << 32  # added to a slot's generation for every bridge before this one


class RestartingClient(Bridge):
    """A running bridge that survives `restarts` deaths."""

    def __init__(self, start: Callable[[], Client | Team], restarts: int, say: Callable[[str], Any]):
        """
        Args:
          start: starts a bridge, as `client.connect` or `team.connect_team`; called at once, and for every restart.
          restarts: how often at most.
          say: called with a sentence at every restart; has to wait for whatever reads the dead bridge's memory.
        """
        self._start, self._restarts_left, self._say = start, restarts, say
        self.life = 0
        self._client = start()
        self._pending: deque[tuple[str, Sequence[Row]]] = deque()  # asked for and not answered
        self._borrowed: dict[tuple[int, int], Client | Team] = {}  # (slot, generation) -> whose memory it is
        self.ready = self._client.ready
        self.num_slots = self._client.num_slots
        self.num_ranks = self._client.num_ranks
        self.transport = self._client.transport
        self.ring_bytes = self._client.ring_bytes

    @property
    def pid(self) -> int:
        return self._client.pid

    @property
    def exit_code(self) -> int | None:
        return self._client.exit_code

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        self._pending.append((split, rows))
        try:
            return self._client.fill(split, rows)
        except BridgeError as error:
            return self._restart(error)

    def next_filled(self, timeout: float | None = None) -> Filled:
        """See `Bridge.next_filled`; raises for a bridge's death only when its restarts are used up."""
        while True:
            try:
                filled = self._client.next_filled(timeout)
            except BridgeError as error:
                if not error.retryable:
                    self._pending.popleft()
                    raise
                self._restart(error)
                continue
            self._pending.popleft()
            filled = replace(filled, generation=filled.generation + self.life * _LIFE)
            self._borrowed[filled.slot, filled.generation] = self._client
            return filled

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        return self._borrowed[filled.slot, filled.generation].slot(filled, device_id, rank)

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        """See `Bridge.weights`. After a restart they have to be asked for again: the old ones are unmapped."""
        return self._client.weights(device_id)

    def release(self, slot: int, generation: int) -> None:
        """See `Bridge.release`. A slot of a bridge that is gone goes back to nobody."""
        client = self._borrowed.pop((slot, generation), None)
        if client is self._client:
            try:
                client.release(slot, generation % _LIFE)
            except BridgeError as error:
                self._restart(error)
        elif client is not None and client not in self._borrowed.values():
            client.close()

    def ask(self, request: Decode | Check, timeout: float) -> Decoded | Checked:
        """See `Bridge.ask`; raises for a bridge's death only when its restarts are used up."""
        while True:
            try:
                return self._client.ask(request, timeout)
            except BridgeError as error:
                if not error.retryable:
                    raise
                self._restart(error)

    def close(self, grace_s: float = 5.0) -> None:
        for client in {self._client, *self._borrowed.values()}:
            client.close(grace_s)

    def _restart(self, error: BridgeError) -> int:
        """A new bridge in the place of the dead one, with everything that is under way asked for again.

        Returns the id of the last request, 0 if there is none. Raises `error` if no restart is left.
        """
        while True:
            if not error.retryable or not self._restarts_left:
                raise error
            self._restarts_left -= 1
            self._say(f"{error}; starting it again ({self._restarts_left} restarts left)")
            dead = self._client
            dead.end(grace_s=0.0)
            dead.close_weights()  # the next bridge needs the room
            if dead not in self._borrowed.values():  # its memory, when nobody reads it any more
                dead.close()
            try:
                self._client = self._start()
                self.life += 1
                _check_same(self.ready, self._client.ready)
                request_id = 0
                for split, rows in self._pending:
                    request_id = self._client.fill(split, rows)
                return request_id
            except BridgeError as another:
                error = another
            except (ValueError, OSError, CudaError) as reason:  # `connect`: no interpreter, no room here
                error = BridgeError(f"{error}; it cannot be started again: {reason}", kind="refused")


def _check_same(before: Ready, now: Ready) -> None:
    """A restart must change nothing.

    Raises:
      BridgeError: "refused", if the data, or what is captured, is not what it was.
    """
    digests = [{split: table.digest for split, table in ready.indexes.items()} for ready in (before, now)]
    if digests[0] != digests[1] or before.target != now.target:
        raise BridgeError(
            "the restarted feature bridge has another index or target than before: the data or the model was changed "
            "during the run; start the run again",
            kind="refused",
        )

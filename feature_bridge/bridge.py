"""A running bridge as the trainer sees it, whatever is behind it: a process, several ranks, or no process at all."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, Self

from feature_bridge.contracts import Check, Checked, Decode, Decoded, Dtype, Filled, Ready, Row
from feature_bridge.memory import Producer


class Bridge(abc.ABC):
    """Fills slots in the order of the requests, decodes and checks drafts. A context manager, which closes it.

    Attributes:
      ready: what the bridge said of itself when it was ready.
      num_ranks: processes that hold one target together; each has a ring of its own.
      num_slots, ring_bytes: of each ring.
      transport: where the slots are, as in `BridgeSpec`.
      life: bridges that ran in this one's place before; what `weights` gave belongs to one life.
      pid: of the (first) bridge process.
    """

    ready: Ready
    num_ranks: int = 1
    num_slots: int
    ring_bytes: int
    transport: str
    life: int = 0
    pid: int

    @abc.abstractmethod
    def fill(self, split: str, rows: Sequence[Row]) -> int:
        """Asks for a slot with these rows (those of all ranks), and returns the request's id at once."""

    @abc.abstractmethod
    def next_filled(self, timeout: float | None = None) -> Filled:
        """Waits for the oldest fill that was not answered yet: answers come in the order of the requests.

        Args:
          timeout: seconds; None: the bridge's own limit for one slot.

        Raises:
          BridgeError: "failed" for this request alone; "died" or "timeout".
        """

    @abc.abstractmethod
    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        """The arrays of a rank's slot by field name, on JAX's local device `device_id`; to be read until `release`."""

    @abc.abstractmethod
    def release(self, slot: int, generation: int) -> None:
        """Gives a slot back: nothing may read its arrays any more. Late or repeated, it changes nothing."""

    @abc.abstractmethod
    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        """The target's "embedding" and "head" [V, H] where the bridge has them, not copied.

        Raises:
          ValueError: they cannot be shared, and why.
        """

    @abc.abstractmethod
    def ask(self, request: Decode | Check, timeout: float) -> Any:
        """The answer to a request, whose id is set here; its turn comes after the fills asked for before.

        Raises:
          BridgeError: as `next_filled`.
        """

    @abc.abstractmethod
    def close(self, grace_s: float = 5.0) -> None:
        """Ends the bridge: in good order within `grace_s` seconds, else by force. A second call does nothing."""

    def decode(
        self,
        draft_path: str,
        samples: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        timeout: float = math.inf,
    ) -> Decoded:
        """Decodes held-out conversations with an exported draft, greedily at temperature 0. Raises as `ask`."""
        request = Decode(
            request_id=0,
            draft_path=draft_path,
            samples=tuple(samples),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return self.ask(request, timeout)

    def check(
        self,
        draft_path: str,
        inputs_path: str,
        systems: Sequence[str],
        embedding_dtype: Dtype,
        *,
        timeout: float = math.inf,
    ) -> Checked:
        """Runs the blocks of a file through the systems that load a draft. Raises as `ask`."""
        request = Check(
            request_id=0,
            draft_path=draft_path,
            inputs_path=inputs_path,
            systems=tuple(systems),
            embedding_dtype=embedding_dtype,
        )
        return self.ask(request, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

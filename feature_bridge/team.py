"""Several bridges that hold one target together, tensor parallel, as one bridge.

    trainer --the rows of all ranks--> rank 0, rank 1, ..: every rank runs every row, and writes its own into its ring

A rank is a process with a GPU and a ring of its own. All of them get the same requests in the same order, so that a
slot and its generation have the same number on each. One rank that ends takes the others along.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from feature_bridge.bridge import Bridge
from feature_bridge.client import Client
from feature_bridge.contracts import BridgeSpec, Check, Checked, Decode, Decoded, Filled, FilledRow, Row
from feature_bridge.link import BridgeError, killed_on_error, launch
from feature_bridge.memory import Producer


@dataclass(frozen=True, kw_only=True)
class TeamFilled(Filled):
    """A slot on every rank; `rows` are those of all."""

    filled: tuple[Filled, ...]

    @property
    def parts(self) -> tuple[Filled, ...]:
        return self.filled


def connect_team(
    specs: Sequence[BridgeSpec],
    *,
    log_paths: Sequence[str | Path],
    envs: Sequence[Mapping[str, str]],
    python: str | None = None,
    start_timeout_s: float = 1800.0,
    request_timeout_s: float = 300.0,
    hang_timeout_s: float = 4.0,
    worker: str | None = None,
) -> Team:
    """Starts the ranks, each with a spec, a log and an environment of its own; the rest is as in `client.connect`."""
    deadline = time.monotonic() + start_timeout_s
    port, links = _free_port(), []
    specs = [replace(spec, rank=replace(spec.rank, port=port)) for spec in specs]
    with contextlib.ExitStack() as started:
        for i, (spec, log_path, env) in enumerate(zip(specs, log_paths, envs, strict=True)):
            name = f"rank {i} of {len(specs)} of the feature bridge"
            link = launch(spec, log_path=log_path, python=python, env=env, worker=worker, name=name)
            started.enter_context(killed_on_error([link]))
            links.append(link)
        for link in links:
            link.peers = [peer for peer in links if peer is not link]
        limits = (deadline, request_timeout_s, hang_timeout_s)
        return Team([Client(spec, link, *limits) for spec, link in zip(specs, links, strict=True)])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Team(Bridge):
    """The ranks of one target."""

    def __init__(self, ranks: Sequence[Client]):
        self._ranks, first = tuple(ranks), ranks[0]
        for i, rank in enumerate(ranks):
            digests = {split: table.digest for split, table in rank.ready.indexes.items()}
            if digests != {split: table.digest for split, table in first.ready.indexes.items()}:
                raise BridgeError(f"ranks 0 and {i} of the feature bridge read different data", kind="refused")
        self.ready = first.ready
        self.num_ranks = len(ranks)
        self.num_slots = first.num_slots
        self.transport = first.transport
        self.ring_bytes = first.ring_bytes

    @property
    def pid(self) -> int:
        return self._ranks[0].pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of all ranks."""
        return tuple(rank.pid for rank in self._ranks)

    @property
    def exit_code(self) -> int | None:
        return self._ranks[0].exit_code

    def fill(self, split: str, rows: Sequence[Row]) -> int:
        ids = [rank.fill(split, rows) for rank in self._ranks]
        return ids[0]

    def next_filled(self, timeout: float | None = None) -> TeamFilled:
        filled = tuple(rank.next_filled(timeout) for rank in self._ranks)
        first = filled[0]
        assert {(part.slot, part.generation) for part in filled} == {(first.slot, first.generation)}
        rows: dict[int, FilledRow] = {row.row_id: row for part in filled for row in part.rows}
        return TeamFilled(
            request_id=first.request_id,
            slot=first.slot,
            generation=first.generation,
            rows=tuple(rows.values()),
            seconds=max(part.seconds for part in filled),
            filled=filled,
        )

    def slot(self, filled: Filled, device_id: int | None = None, rank: int = 0) -> dict[str, Producer]:
        return self._ranks[rank].slot(filled, device_id)

    def release(self, slot: int, generation: int) -> None:
        for rank in self._ranks:
            rank.release(slot, generation)

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        """See `Bridge.weights`: a ValueError, for each rank has a part of them."""
        return self._ranks[0].weights(device_id)

    def close_weights(self) -> None:
        for rank in self._ranks:
            rank.close_weights()

    def ask(self, request: Decode | Check, timeout: float) -> Decoded | Checked:
        """The first rank's answer, once all of them have answered."""
        ids = [rank.send(request) for rank in self._ranks]
        answers = [rank.answer(i, timeout) for rank, i in zip(self._ranks, ids, strict=True)]
        return answers[0]

    def close(self, grace_s: float = 5.0) -> None:
        self.end(grace_s)
        for rank in self._ranks:
            rank.close()

    def end(self, grace_s: float = 5.0) -> None:
        """See `Client.end`. All ranks are told before the first is waited for."""
        for rank in self._ranks:
            rank.ask_to_end()
        deadline = time.monotonic() + grace_s
        for rank in self._ranks:
            rank.end(max(0.0, deadline - time.monotonic()))

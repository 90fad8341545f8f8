"""From the bridges' slots to batches of JAX arrays without a copy.

    requests --at most num_slots under way--> bridge --Filled--> DLPack view of the slot -> Batch -> step ... -> release

Legend: R rows of a slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from feature_bridge.contracts import Filled, FilledRow, Row
from feature_bridge.memory import Producer
from jaxdraft.bridges import Bridge, BridgeError, Seat, seats, teams
from jaxdraft.objective import Batch, batch_shardings
from jaxdraft.run import Request, Rows
from jaxdraft.sharding import num_row_groups


class Slot(NamedTuple):
    """A micro-batch that lives in borrowed memory until it is released."""

    batch: Batch
    filled: tuple[Filled, ...]  # one for each bridge
    planned: Rows  # every row of the batch

    @property
    def rows(self) -> tuple[FilledRow, ...]:
        """What is in each row that this process filled, samples that were left out included."""
        return tuple({row.row_id: row for filled in self.filled for row in filled.rows}.values())


class FeatureStream:
    """An iterator over the slots of `requests`, in their order, filled ahead.

    At most `num_slots` requests are under way: asked for, being filled, or filled and not released. So the loop may
    hold a slot while the next ones are filled, and must release it when the step that read it is done. One stream reads
    a bridge at a time; training and held-out requests share it, in the order in which they will be used.

    Attributes:
      seconds_waiting: how long `next` has waited for the bridge so far.
    """

    def __init__(self, bridge: Bridge | Sequence[Bridge], requests: Iterable[Request], mesh: Mesh | None = None):
        """
        Args:
          bridge: one, or one for each of the mesh's `teams`.
          requests: what to ask for, the rows of all processes; read `num_slots` ahead.
          mesh: that the batch is for; None: everything on the first local device.
        """
        self._bridges = tuple(bridge) if isinstance(bridge, Sequence) else (bridge,)
        self._mesh = mesh
        self._teams = [seats(None)] if mesh is None else teams(mesh, self._bridges[0].num_ranks)
        assert len(self._teams) == len(self._bridges), "one bridge for each team of local devices"
        self._requests = iter(requests)
        self._exhausted = False
        self._pending: deque[Request] = deque()  # asked for and not returned
        self._borrowed: dict[tuple[Filled, ...], Batch] = {}  # returned and not released
        # Views made ahead: one takes JAX most of a millisecond, and slots come round again.
        self._views: dict[tuple[int, ...], Batch] = {}
        self._num_slots = min(bridge.num_slots for bridge in self._bridges)
        self.seconds_waiting = 0.0

    def __iter__(self) -> Iterator[Slot]:
        return self

    def __next__(self) -> Slot:
        """The next slot.

        Raises:
          BridgeError: the bridge died, is too slow, or could not fill it.
        """
        self._ask()
        if not self._pending:
            assert self._exhausted, "every slot is borrowed: release one first"
            raise StopIteration
        start = time.perf_counter()
        filled = tuple(bridge.next_filled() for bridge in self._bridges)
        self.seconds_waiting += time.perf_counter() - start

        request = self._pending.popleft()
        self._check(filled, request)
        slot = Slot(self._view(filled), filled, request.rows)
        self._borrowed[filled] = slot.batch
        return slot

    def release(self, filled: tuple[Filled, ...]) -> None:
        """Gives a slot back to be filled again.

        Call it when the outputs of every computation that read the batch are ready: JAX runs ahead of Python, on the
        CPU too. The slot's arrays are deleted, so that a later use is an error and not the features of another row.
        (A numpy view of one, `np.asarray` on the CPU, has no such guard: do not keep it.)
        """
        batch = self._borrowed.pop(filled)
        for array in jax.tree.leaves(batch):
            array.delete()
        # The next views of the same memory, while a step runs. (A GPU's copies of host memory have to wait for it.)
        parts = self._parts(filled)
        if all(bridge.transport == "cuda_ipc" or seat.device.platform == "cpu" for seat, bridge, *_ in parts):
            self._views[self._place(filled)] = self._make_views(filled)
        for bridge, one in zip(self._bridges, filled, strict=True):
            bridge.release(one.slot, one.generation)
        self._ask()

    def _ask(self) -> None:
        """Tops up the requests under way."""
        while not self._exhausted and len(self._pending) + len(self._borrowed) < self._num_slots:
            request = next(self._requests, None)
            if request is None:
                self._exhausted = True
                return
            rows = [Row(row_id=row_id, samples=tuple(samples)) for row_id, samples in request.rows]
            for team, bridge in zip(self._teams, self._bridges, strict=True):
                first, last = self._own(team[0], len(rows)), self._own(team[-1], len(rows))
                bridge.fill(request.split, rows[first.start : last.stop])
            self._pending.append(request)

    def _own(self, seat: Seat, num_rows: int) -> slice:
        """The rows of a seat among those of all processes."""
        groups = 1 if self._mesh is None else num_row_groups(self._mesh)
        per_slot = num_rows // groups
        return slice(seat.rows * per_slot, (seat.rows + 1) * per_slot)

    def _check(self, filled: tuple[Filled, ...], request: Request) -> None:
        """Slots hold what was asked for, and devices that share a row agree about its samples."""
        known: dict[int, FilledRow] = {}
        for seat, _, one, rank in self._parts(filled):
            own = request.rows[self._own(seat, len(request.rows))]
            assert [row.row_id for row in one.parts[rank].rows] == [row_id for row_id, _ in own]
            for row in one.parts[rank].rows:
                if known.setdefault(row.row_id, row).samples != row.samples:
                    raise BridgeError(
                        f"the bridges that share row {row.row_id} left out different samples of it", kind="failed"
                    )

    def _parts(self, filled: tuple[Filled, ...]) -> Iterator[tuple[Seat, Bridge, Filled, int]]:
        """Each seat with its bridge, what that filled, and the seat's rank in it."""
        for team, bridge, one in zip(self._teams, self._bridges, filled, strict=True):
            for rank, seat in enumerate(team):
                yield seat, bridge, one, rank

    def _view(self, filled: tuple[Filled, ...]) -> Batch:
        """The filled slots as one batch of global arrays; the shard of each device is its slot's memory."""
        return self._views.pop(self._place(filled), None) or self._make_views(filled)

    def _make_views(self, filled: tuple[Filled, ...]) -> Batch:
        shards = []
        for seat, *where in self._parts(filled):
            producers = _producers(seat.device, *where)
            arrays = {name: jax.dlpack.from_dlpack(producer, copy=False) for name, producer in producers.items()}
            # Where they are already, except that a GPU needs a copy of host memory.
            shards.append(jax.device_put(arrays, seat.device))
        return Batch(**{name: self._assemble(name, [shard[name] for shard in shards]) for name in shards[0]})

    def _assemble(self, name: str, shards: list[jax.Array]) -> jax.Array:
        if self._mesh is None:
            return shards[0]
        sharding = getattr(batch_shardings(self._mesh), name)
        return jax.make_array_from_single_device_arrays(_global_shape(shards[0].shape, sharding), sharding, shards)

    def _place(self, filled: tuple[Filled, ...]) -> tuple[int, ...]:
        """Where the slots are in memory. (Not which they are: a bridge that was started again has others.)"""
        return tuple(
            next(iter(_producers(seat.device, *where).values())).address for seat, *where in self._parts(filled)
        )


def _producers(device: jax.Device, bridge: Bridge, filled: Filled, rank: int) -> dict[str, Producer]:
    """The arrays of a rank's slot, as `device` sees them."""
    on_host = bridge.transport != "cuda_ipc"
    device_id = 0 if on_host and device.platform != "cpu" else device.local_hardware_id
    return bridge.slot(filled, device_id, rank=rank)


def _global_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The shape of the array whose shards have this one."""
    whole = list(shape)
    for dim, axes in enumerate(sharding.spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            whole[dim] *= sharding.mesh.shape[axis]
    return tuple(whole)

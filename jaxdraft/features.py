"""From the bridge's slots to batches of JAX arrays without a copy. The only file here that knows `feature_bridge`.

    requests --at most num_slots under way--> bridge --Filled--> DLPack view of the slot -> Batch -> step ... -> release

Legend: R rows of a slot. Every local device has a bridge and a ring of its own (`seats`); devices that differ only in
their place on the mesh's tensor axis share rows, and each gets the features of its part of the tokens.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from feature_bridge.client import BridgeError, Client, connect
from feature_bridge.contracts import BridgeSpec, DataSpec, Filled, FilledRow, Row, TargetSpec
from feature_bridge.cuda_ipc import Gpu, host_gpus
from feature_bridge.in_process import InProcessClient
from feature_bridge.restart import RestartingClient
from feature_bridge.server import DEFAULT_WORKER, load_worker
from jaxdraft.config import Config
from jaxdraft.gpu_memory import jax_memory_limit
from jaxdraft.objective import Batch, batch_shardings

__all__ = [
    "Bridge",
    "BridgeError",
    "FeatureStream",
    "Seat",
    "Slot",
    "make_bridge_spec",
    "mapped_weights",
    "memory_use",
    "open_bridge",
    "seats",
]

Bridge = Client | RestartingClient | InProcessClient


class Seat(NamedTuple):
    """A device and what its slots hold."""

    device: jax.Device
    rows: int = 0
    """Which of the micro-batch's groups of R rows."""
    feature_slice: tuple[int, int] = (0, 1)
    """(i, n): the i-th of n parts of each row's features."""


def seats(mesh: Mesh | None) -> list[Seat]:
    """This process's devices in the order of their rows; the first local device without a mesh."""
    if mesh is None:
        return [Seat(jax.local_devices()[0])]
    _, fsdp, tensor = mesh.devices.shape
    placed = (Seat(mesh.devices[d, f, t], d * fsdp + f, (t, tensor)) for d, f, t in np.ndindex(mesh.devices.shape))
    return [seat for seat in placed if seat.device.process_index == jax.process_index()]


def make_bridge_spec(
    config: Config, layer_ids: Sequence[int], feature_slice: tuple[int, int] = (0, 1), slot_gpu: int = 0
) -> BridgeSpec:
    """What the bridge must know of a run: the target captured at `layer_ids`, the data, the slots."""
    target, data, bridge = config.target, config.data, config.bridge
    return BridgeSpec(
        target=TargetSpec(
            path=target.path,
            revision=target.revision,
            backend=target.backend,
            dtype=target.dtype,
            layer_ids=tuple(layer_ids),
            trust_remote_code=target.trust_remote_code,
            sglang_args=dict(bridge.sglang_args),
            verify=bridge.verify,
        ),
        data=DataSpec(
            train_path=data.train_path,
            eval_path=data.eval_path,
            eval_fraction=data.eval_fraction,
            max_length=data.row_tokens,
            too_long=data.too_long,
            min_supervised=2 * config.draft.block_size,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            num_workers=data.num_workers,
            cache_dir=data.cache_dir,
        ),
        rows_per_slot=config.rows_per_device,
        row_tokens=data.row_tokens,
        num_slots=bridge.num_slots,
        feature_dtype=bridge.feature_dtype,
        transport=bridge.transport,
        memory_fraction=bridge.memory_fraction,
        slot_gpu=slot_gpu,
        feature_slice=feature_slice,
    )


def open_bridge(config: Config, layer_ids: Sequence[int], *, log_path: str | Path, seat: Seat | None = None) -> Bridge:
    """Starts the bridge and waits until it is ready; a context manager, which closes it.

    Args:
      config: of the run.
      layer_ids: target layers to capture, ascending.
      log_path: file that the bridge process writes its output to.
      seat: whose device will read the slots: where it is a GPU, the bridge sees this one alone. None: the first local.

    Raises:
      ValueError: the bridge cannot run this config.
      BridgeError: it cannot run this config, says the bridge itself, or it did not start.
    """
    seat = seat or seats(None)[0]
    device = seat.device
    env = _environment(device, config.bridge.devices)
    slot_gpu = env.get("CUDA_VISIBLE_DEVICES", "").count(",")  # the target's GPU, and the slots' if that is another
    spec = make_bridge_spec(config, layer_ids, seat.feature_slice, slot_gpu)
    if spec.transport == "in_process":
        return InProcessClient(spec, load_worker(DEFAULT_WORKER)(spec))
    if spec.transport == "cuda_ipc" and device.platform == "cpu":
        raise ValueError(
            "bridge.transport='cuda_ipc' needs JAX on a GPU, and it runs on the CPU here: install jaxdraft[cuda13] or "
            "jaxdraft[cuda12], or use bridge.transport='shared_memory'"
        )
    start = functools.partial(
        connect,
        spec,
        log_path=log_path,
        python=config.bridge.python,
        env=env,
        start_timeout_s=config.bridge.start_timeout_s,
        request_timeout_s=config.bridge.request_timeout_s,
    )
    if not config.bridge.restarts:
        return start()
    return RestartingClient(start, config.bridge.restarts, say=_announce_restart)


def _announce_restart(sentence: str) -> None:
    print(sentence, file=sys.stderr)
    jax.block_until_ready(jax.live_arrays())  # the dead bridge's weights are about to be unmapped


def _environment(device: jax.Device, target_gpus: Sequence[int] | None) -> dict[str, str]:
    """A bridge's own environment: on a CPU half of the cores, and among several GPUs the target's and the slots'.

    Raises:
      ValueError: a GPU of `target_gpus` is not there.
    """
    if device.platform == "cpu":
        # Threads of two processes that spin for the same cores slow each other down many times over.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 2) // 2))
        return {"OMP_NUM_THREADS": threads}
    if len(jax.local_devices()) == 1 and target_gpus is None:
        return {}
    own, there = Gpu(device.local_hardware_id).uuid, host_gpus()
    if target_gpus is None:
        return {"CUDA_VISIBLE_DEVICES": own}
    chosen = target_gpus[jax.local_devices().index(device) % len(target_gpus)]
    if chosen not in range(len(there)):
        raise ValueError(f"bridge.devices has GPU {chosen}, and nvidia-smi lists {len(there)}; name one of those")
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys([there[chosen], own]))}


def memory_use(bridge: Bridge, device: jax.Device) -> dict[str, int]:
    """Who holds how many bytes of the GPU that trainer and bridge share; empty where the target runs on a CPU.

    Where the target is on a GPU of its own, that one first.
    """
    gpu = bridge.ready.gpu
    if gpu is None:
        return {}
    use = {"target: weights": gpu.weights, "target: pools and workspace": max(0, gpu.reserved - gpu.weights)}
    slots = {f"bridge: {bridge.num_slots} slots": bridge.ring_bytes if bridge.transport == "cuda_ipc" else 0}
    if device.platform == "cpu":
        return use | slots | {"free": gpu.free, "the whole GPU": gpu.total}
    own = Gpu(device.local_hardware_id)
    if own.uuid != gpu.uuid:
        use |= {"free on the target's GPU": gpu.free, "the target's whole GPU": gpu.total}
    free, total = own.memory_info()
    limit = jax_memory_limit(device)
    trainer = {} if limit is None else {"trainer: JAX": limit}
    return use | slots | trainer | {"free": free, "the whole GPU": total}


def mapped_weights(bridge: Bridge, device: jax.Device) -> dict[str, jax.Array]:
    """The target's "embedding" and "head" [V, H] in the bridge's own memory, as arrays of `device`.

    Raises:
      ValueError: they cannot be had without a copy; a phrase that says why.
    """
    producers = bridge.weights(device.local_hardware_id)
    try:
        return {name: jax.dlpack.from_dlpack(producer, copy=False) for name, producer in producers.items()}
    except Exception as error:  # JAX refuses in several ways: alignment, or memory of another platform
        raise ValueError(f"JAX does not take them as they are ({str(error).splitlines()[0]})") from error


class Request(Protocol):
    """One micro-batch: rows as (row id, positions of its samples in the split's index), R for each device."""

    split: str
    rows: Sequence[tuple[int, Sequence[int]]]


class Slot(NamedTuple):
    """A micro-batch that lives in borrowed memory until it is released."""

    batch: Batch
    filled: tuple[Filled, ...]  # one for each local device
    planned: Sequence[tuple[int, Sequence[int]]]  # every row of the batch: (row id, samples)

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
          bridge: one, or one for each seat of the mesh.
          requests: what to ask for, the rows of all processes; read `num_slots` ahead.
          mesh: that the batch is for; None: everything on the first local device.
        """
        self._bridges = tuple(bridge) if isinstance(bridge, Sequence) else (bridge,)
        self._seats = seats(mesh)
        self._mesh = mesh
        assert len(self._seats) == len(self._bridges), "one bridge for each local device"
        self._requests = iter(requests)
        self._exhausted = False
        self._pending: deque[Request] = deque()  # asked for and not returned
        self._borrowed: dict[tuple[Filled, ...], Batch] = {}  # returned and not released
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
        for array in (batch.tokens, batch.segment_start, batch.loss_mask, batch.features):
            array.delete()
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
            for seat, bridge in zip(self._seats, self._bridges, strict=True):
                bridge.fill(request.split, rows[self._own(seat, len(rows))])
            self._pending.append(request)

    def _own(self, seat: Seat, num_rows: int) -> slice:
        """The rows of a seat among those of all processes."""
        groups = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        per_slot = num_rows // groups
        return slice(seat.rows * per_slot, (seat.rows + 1) * per_slot)

    def _check(self, filled: tuple[Filled, ...], request: Request) -> None:
        """Slots hold what was asked for, and devices that share a row agree about its samples."""
        known: dict[int, FilledRow] = {}
        for seat, one in zip(self._seats, filled, strict=True):
            own = request.rows[self._own(seat, len(request.rows))]
            assert [row.row_id for row in one.rows] == [row_id for row_id, _ in own]
            for row in one.rows:
                if known.setdefault(row.row_id, row).samples != row.samples:
                    raise BridgeError(
                        f"the bridges that share row {row.row_id} left out different samples of it", kind="failed"
                    )

    def _view(self, filled: tuple[Filled, ...]) -> Batch:
        """The filled slots as one batch of global arrays; the shard of each device is its slot's memory."""
        shards = [
            Batch(**_arrays_on(seat.device, bridge, one))
            for seat, bridge, one in zip(self._seats, self._bridges, filled, strict=True)
        ]
        if self._mesh is None:
            return shards[0]

        def assemble(sharding: NamedSharding, *arrays: jax.Array) -> jax.Array:
            shape = _global_shape(arrays[0].shape, sharding)
            return jax.make_array_from_single_device_arrays(shape, sharding, list(arrays))

        return jax.tree.map(assemble, batch_shardings(self._mesh), *shards)


def _arrays_on(device: jax.Device, bridge: Bridge, filled: Filled) -> dict[str, jax.Array]:
    """One slot's arrays on `device`: views, except that a GPU needs a copy of host memory."""
    on_host = bridge.transport != "cuda_ipc"
    device_id = 0 if on_host and device.platform != "cpu" else device.local_hardware_id
    arrays = {
        name: jax.dlpack.from_dlpack(producer, copy=False) for name, producer in bridge.slot(filled, device_id).items()
    }
    small = {
        "num_tokens": np.asarray([row.num_tokens for row in filled.rows], np.int32),
        "row_ids": np.asarray([row.row_id for row in filled.rows], np.int32),
    }
    # device_put leaves an array that is on the device already where it is.
    return jax.device_put({**arrays, **small}, device)


def _global_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The shape of the array whose shards have this one."""
    whole = list(shape)
    for dim, axes in enumerate(sharding.spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            whole[dim] *= sharding.mesh.shape[axis]
    return tuple(whole)

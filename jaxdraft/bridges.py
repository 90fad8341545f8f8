"""The bridges of a process, one for each of its devices: how they are started, and what they hold.

Every local device has a bridge process and a ring of its own (`seats`); devices that differ only in their place on the
mesh's tensor axis share rows, and each gets the features of its part of the tokens. With a tensor-parallel target the
bridges of neighbouring devices are its ranks, and work as one bridge (`teams`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from feature_bridge.bridge import Bridge
from feature_bridge.client import BridgeError, connect
from feature_bridge.contracts import BridgeSpec, DataSpec, Rank, TargetSpec
from feature_bridge.cuda_ipc import Gpu, host_gpus, num_gpus
from feature_bridge.in_process import InProcessClient
from feature_bridge.restart import RestartingClient
from feature_bridge.server import DEFAULT_WORKER, load_worker
from feature_bridge.team import connect_team
from jaxdraft.config import Config
from jaxdraft.gpu_memory import jax_memory_limit

__all__ = [
    "Bridge",
    "BridgeError",
    "Seat",
    "make_bridge_spec",
    "mapped_weights",
    "memory_use",
    "open_bridge",
    "open_bridges",
    "seats",
    "teams",
]


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


def teams(mesh: Mesh | None, tensor_parallel: int) -> list[list[Seat]]:
    """The seats of each target of this process, in their order.

    Raises:
      ValueError: the devices cannot be grouped so.
    """
    all_seats = seats(mesh)
    if len(all_seats) % tensor_parallel:
        raise ValueError(
            f"bridge.tensor_parallel={tensor_parallel} does not divide the {len(all_seats)} devices of a process; "
            "give a divisor, and start one process a host"
        )
    return [all_seats[i : i + tensor_parallel] for i in range(0, len(all_seats), tensor_parallel)]


def make_bridge_spec(config: Config, layer_ids: Sequence[int], **own: Any) -> BridgeSpec:
    """What a bridge must know of a run: the target captured at `layer_ids`, the data, the slots.

    `own`: the fields of `BridgeSpec` that differ between the bridges of a run.
    """
    target, data, bridge = config.target, config.data, config.bridge
    default_readers = 4 if bridge.transport == "cuda_ipc" else 0  # beside a GPU: threads hold up its kernels' launches
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
            cuda_graphs=bridge.cuda_graphs,
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
            video_fps=data.video_fps,
            video_max_frames=data.video_max_frames,
            video_min_pixels=data.video_min_pixels,
            video_max_pixels=data.video_max_pixels,
            num_workers=data.num_workers,
            cache_dir=data.cache_dir,
        ),
        rows_per_slot=config.rows_per_device,
        row_tokens=data.row_tokens,
        num_slots=bridge.num_slots,
        feature_dtype=bridge.feature_dtype,
        transport=bridge.transport,
        memory_fraction=bridge.memory_fraction,
        reader_processes=default_readers if bridge.reader_processes is None else bridge.reader_processes,
        **own,
    )


def open_bridge(
    config: Config, layer_ids: Sequence[int], *, log_path: str | Path, team: Sequence[Seat] | None = None
) -> Bridge:
    """Starts the bridge and waits until it is ready; a context manager, which closes it.

    Args:
      config: of the run.
      layer_ids: target layers to capture, ascending.
      log_path: file that the bridge process writes its output to; further ranks write to .1, .2, ..
      team: the devices that will read the slots, one for each rank of the target; a rank sees only its own GPU. None:
        the first local devices.

    Raises:
      ValueError: the bridge cannot run this config.
      BridgeError: the bridge itself refused the config, or did not start.
    """
    team = team or [Seat(device) for device in jax.local_devices()[: config.bridge.tensor_parallel]]
    transport, device = config.bridge.transport, team[0].device
    if transport == "in_process":
        spec = make_bridge_spec(config, layer_ids, feature_slice=team[0].feature_slice)
        return InProcessClient(spec, load_worker(DEFAULT_WORKER)(spec))
    if transport == "cuda_ipc" and device.platform == "cpu":
        raise ValueError(
            "bridge.transport='cuda_ipc' needs JAX on a GPU, and it runs on the CPU here: install jaxdraft[cuda13] or "
            "jaxdraft[cuda12], or use bridge.transport='shared_memory'"
        )
    envs = [_environment(seat.device, config.bridge.devices) for seat in team]
    first, groups = team[0].rows, len({seat.rows for seat in team})
    specs = [
        make_bridge_spec(
            config,
            layer_ids,
            feature_slice=seat.feature_slice,
            row_slice=(seat.rows - first, groups),
            rank=Rank(index=i, count=len(team)),
            # The bridge sees the target's GPU, and the slots' if that is another.
            slot_gpu=env.get("CUDA_VISIBLE_DEVICES", "").count(","),
        )
        for i, (seat, env) in enumerate(zip(team, envs, strict=True))
    ]
    options = {
        "python": config.bridge.python,
        "start_timeout_s": config.bridge.start_timeout_s,
        "request_timeout_s": config.bridge.request_timeout_s,
        "hang_timeout_s": config.bridge.hang_timeout_s,
    }
    if len(team) == 1:
        start = functools.partial(connect, specs[0], log_path=log_path, env=envs[0], **options)
    else:
        log_paths = [log_path, *(f"{log_path}.{i}" for i in range(1, len(team)))]
        start = functools.partial(connect_team, specs, log_paths=log_paths, envs=envs, **options)
    if not config.bridge.restarts:
        return start()
    return RestartingClient(start, config.bridge.restarts, say=_announce_restart)


@contextlib.contextmanager
def open_bridges(config: Config, layer_ids: Sequence[int], mesh: Mesh, log_paths: Sequence[Path]) -> Iterator[list]:
    """The bridges of this process's devices, see `open_bridge`; all are closed at the end.

    The first one starts alone, since it leaves the data's index in the cache, then the others at the same time.
    """
    first, *others = teams(mesh, config.bridge.tensor_parallel)
    with contextlib.ExitStack() as stack:

        def start(team: Sequence[Seat], log_path: Path, started: Future[Bridge]) -> None:
            try:
                started.set_result(open_bridge(config, layer_ids, log_path=log_path, team=team))
            except BaseException as error:
                started.set_exception(error)

        bridges = [stack.enter_context(open_bridge(config, layer_ids, log_path=log_paths[0], team=first))]
        starts = [Future() for _ in others]
        for arguments in zip(others, log_paths[1:], starts, strict=False):
            # Daemons: a signal, or the first of them that fails, does not wait for the others' targets to be loaded.
            threading.Thread(target=start, args=arguments, name="bridge", daemon=True).start()
        stack.callback(lambda: [started.add_done_callback(_close) for started in starts])
        for started in wait(starts, return_when=FIRST_EXCEPTION).done:
            started.result()
        yield [*bridges, *(started.result() for started in starts)]


def _close(started: Future[Bridge]) -> None:
    if started.exception() is None:
        started.result().close()


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
    if num_gpus() == 1 and target_gpus is None:  # of several that it sees, a process may have been given one
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

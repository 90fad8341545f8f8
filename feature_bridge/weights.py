"""The target's embedding and LM head, lent to the trainer where both processes use one GPU: no second copy.

    bridge:  target.frozen() -> producers -> share --CUDA IPC handles--> trainer: MappedWeights -> DLPack producers

They never change and the bridge never frees them, so they need no leases. A mapping is valid as long as its bridge
runs: close it, once nothing reads it any more, before another bridge is started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from feature_bridge.contracts import SharedMatrix, SharedWeights
from feature_bridge.cuda_ipc import CudaError, Gpu, find_gpu
from feature_bridge.memory import CUDA, Producer


def share(transport: str, weights: Callable[[], Mapping[str, Producer]]) -> SharedWeights:
    """The bridge's side: the message that lends them.

    Args:
      transport: of the slots.
      weights: gives "embedding" and "head", both [V, H] in the memory of one GPU; a ValueError says why it cannot.
    """
    if transport != "cuda_ipc":
        return SharedWeights(reason=f"bridge.transport={transport!r} shares no GPU memory")
    try:
        matrices = weights()
        (ordinal,) = {producer.device[1] for producer in matrices.values()}
        gpu = Gpu(ordinal)
        return SharedWeights(**{name: _export(gpu, m) for name, m in matrices.items()}, gpu_uuid=gpu.uuid)
    except (ValueError, CudaError) as error:  # the driver exports no memory of an expandable-segments allocator
        return SharedWeights(reason=str(error))


def _export(gpu: Gpu, matrix: Producer) -> SharedMatrix:
    handle, offset = gpu.export(matrix.address)
    return SharedMatrix(dtype=matrix.dtype, shape=matrix.shape, cuda_handle=handle, offset=offset)


class MappedWeights:
    """The trainer's side."""

    def __init__(self, shown: SharedWeights):
        self._shown = shown
        self._gpu: Gpu | None = None
        self._mapped: dict[bytes, int] = {}  # handle -> address here

    def arrays(self, device_id: int | None = None) -> dict[str, Producer]:
        """The "embedding" and "head" on the trainer's device; the same address where they are tied.

        Raises:
          ValueError: they cannot be mapped, and why.
        """
        shown = self._shown
        if shown.embedding is None or shown.head is None:
            raise ValueError(shown.reason)
        gpu = find_gpu(shown.gpu_uuid)
        if gpu is None or device_id not in (None, gpu.ordinal):
            raise ValueError("the target is on another GPU than the trainer")
        self._gpu = gpu
        return {"embedding": self._view(gpu, shown.embedding), "head": self._view(gpu, shown.head)}

    def _view(self, gpu: Gpu, matrix: SharedMatrix) -> Producer:
        if matrix.cuda_handle not in self._mapped:
            try:
                self._mapped[matrix.cuda_handle] = gpu.open(matrix.cuda_handle)
            except CudaError as error:
                raise ValueError(str(error)) from error
        address = self._mapped[matrix.cuda_handle] + matrix.offset
        return Producer(address, matrix.dtype, matrix.shape, (CUDA, gpu.ordinal))

    def close(self) -> None:
        """Unmaps them when no kernel of this process uses them any more; arrays over them must not be used again."""
        if self._mapped and self._gpu is not None:
            self._gpu.synchronize()
            for address in self._mapped.values():
                self._gpu.close(address)
        self._mapped = {}

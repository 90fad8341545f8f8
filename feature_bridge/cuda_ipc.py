"""GPU memory that two processes share: plain allocations of the CUDA driver and their IPC handles, by ctypes.

    bridge:  allocate -> export --64-byte handle, the GPU's UUID--> trainer: open -> DLPack producers

Neither torch nor jax nor the CUDA toolkit is needed: both have made the device's *primary context* current, which
`Gpu` retains, so that their kernels and this memory meet. The allocation is the driver's own (`cuMemAlloc`): a block of
torch's allocator could move, or, with expandable segments, could not be exported at all.

Which side may touch a slot when: see `memory`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

from feature_bridge.contracts import RingMemory
from feature_bridge.memory import CUDA, Producer, slot_arrays
from feature_bridge.slot_layout import SlotLayout

HANDLE_BYTES = 64
# The driver packs small allocations into blocks of this size, and a handle means the whole block.
GRANULARITY = 2 << 20
_LAZY_PEER_ACCESS = 1  # the only flag that cuIpcOpenMemHandle takes
_OUT_OF_MEMORY = 2


class CudaError(RuntimeError):
    """The driver refused a call. `code` is its CUresult."""

    def __init__(self, call: str, code: int, name: str):
        super().__init__(f"{call} failed: {name} ({code})")
        self.code = code


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


@functools.cache
def _driver() -> Any:
    """libcuda, initialised. Raises OSError where there is no driver, CudaError where it finds no GPU."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemAlloc_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    driver.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    driver.cuIpcGetMemHandle.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    driver.cuMemsetD8_v2.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t]
    driver.cuMemGetAddressRange_v2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    _check(driver, "cuInit", 0)
    return driver


def _check(driver: Any, name: str, *args: Any) -> None:
    code = getattr(driver, name)(*args)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise CudaError(name, code, (text.value or b"unknown error").decode())


def num_gpus() -> int:
    """GPUs that this process sees; 0 without a driver."""
    count = ctypes.c_int()
    try:
        _check(_driver(), "cuDeviceGetCount", ctypes.byref(count))
    except (OSError, CudaError):
        return 0
    return count.value


def require_gpu(who: str) -> None:
    """Raises ValueError, one sentence, where `who` ("the trainer", "the bridge") sees no GPU."""
    if not num_gpus():
        raise ValueError(
            f"bridge.transport='cuda_ipc' needs an NVIDIA GPU and its driver, and {who} sees none; "
            "use bridge.transport='shared_memory'"
        )


def find_gpu(uuid: str | None) -> Gpu | None:
    """The visible GPU with this UUID, if there is one: its ordinal may differ between processes."""
    return next((gpu for gpu in map(Gpu, range(num_gpus())) if gpu.uuid == uuid), None)


def host_gpus() -> list[str]:
    """UUIDs of all GPUs of this host in nvidia-smi's order, those that CUDA_VISIBLE_DEVICES hides included."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.startswith("GPU-")]


class Gpu:
    """A visible GPU and its primary context. Calls leave the thread's current context as it was."""

    def __init__(self, ordinal: int):
        self.ordinal, self._device = ordinal, ctypes.c_int()
        _check(_driver(), "cuDeviceGet", ctypes.byref(self._device), ordinal)

    @functools.cached_property
    def _context(self) -> ctypes.c_void_p:
        """Retained only where it is needed: a context takes hundreds of MB of a GPU that may be another process's."""
        context = ctypes.c_void_p()
        _check(_driver(), "cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        return context

    @property
    def uuid(self) -> str:
        """The UUID as `nvidia-smi -L` prints it and CUDA_VISIBLE_DEVICES takes it."""
        raw = (ctypes.c_ubyte * 16)()
        _check(_driver(), "cuDeviceGetUuid_v2", raw, self._device)
        return f"GPU-{uuid.UUID(bytes=bytes(raw))}"

    def memory_info(self) -> tuple[int, int]:
        """Bytes free and in total."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, num_bytes: int) -> int:
        """The address of new, zeroed memory. Raises CudaError."""
        address, size = ctypes.c_uint64(), -(-num_bytes // GRANULARITY) * GRANULARITY
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        self._call("cuMemsetD8_v2", address, 0, size)
        self.synchronize()
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def export(self, address: int) -> tuple[bytes, int]:
        """The IPC handle of the allocation that holds `address`, and how far into it that is."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.reserved), address - base.value

    def open(self, handle: bytes) -> int:
        """Where another process's allocation is mapped in this one."""
        assert len(handle) == HANDLE_BYTES
        address = ctypes.c_uint64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Unmaps what `open` mapped."""
        self._call("cuIpcCloseMemHandle", address)

    def synchronize(self) -> None:
        """Waits for all streams of the context."""
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *args: Any) -> None:
        with self._current():
            _check(_driver(), name, *args)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        _check(_driver(), "cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _check(_driver(), "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class CudaMemory:
    """`num_slots` slots of `layout` on one GPU, contiguous: the bridge's own, or opened from its handle."""

    def __init__(self, layout: SlotLayout, num_slots: int, gpu: Gpu, address: int, *, opened: bool):
        self._layout, self._num_slots, self._gpu, self._opened = layout, num_slots, gpu, opened
        self.num_bytes = num_slots * layout.slot_bytes
        self.address = address

    def arrays(self, slot: int, device_id: int | None = None) -> dict[str, Producer]:
        """See `memory.SlotMemory`.

        Raises:
          ValueError: the reader's device is another GPU than the slots'.
        """
        assert 0 <= slot < self._num_slots
        if device_id not in (None, self._gpu.ordinal):
            raise ValueError(
                f"the bridge's slots lie on GPU {self._gpu.ordinal} and the trainer's device is GPU {device_id}; "
                "give both the same GPU with CUDA_VISIBLE_DEVICES, or use bridge.transport='shared_memory'"
            )
        address = self.address + slot * self._layout.slot_bytes
        return slot_arrays(self._layout, address, (CUDA, self._gpu.ordinal))

    def close(self) -> None:
        """Waits for this process's kernels and gives the memory back; its arrays must be gone."""
        self._gpu.synchronize()
        (self._gpu.close if self._opened else self._gpu.free)(self.address)


def create_cuda_memory(layout: SlotLayout, num_slots: int, ordinal: int = 0) -> tuple[CudaMemory, RingMemory]:
    """The bridge's side: zeroed slots on its GPU, and the message that shows them.

    Raises:
      ValueError: no GPU, or the slots do not fit.
    """
    require_gpu("the bridge")
    gpu, num_bytes = Gpu(ordinal), num_slots * layout.slot_bytes
    try:
        address = gpu.allocate(num_bytes)
    except CudaError as error:
        if error.code != _OUT_OF_MEMORY:
            raise
        raise ValueError(
            f"bridge.num_slots={num_slots} slots take {num_bytes / 2**30:.2f} GiB and the GPU has "
            f"{gpu.memory_info()[0] / 2**30:.2f} GiB left; lower trainer.memory_fraction, bridge.num_slots or "
            "data.row_tokens"
        ) from error
    memory = CudaMemory(layout, num_slots, gpu, address, opened=False)
    handle, offset = gpu.export(address)
    assert offset == 0
    return memory, RingMemory(num_bytes=num_bytes, cuda_handle=handle, gpu_uuid=gpu.uuid)


def attach_cuda_memory(layout: SlotLayout, num_slots: int, shown: RingMemory) -> CudaMemory:
    """The trainer's side.

    Raises:
      ValueError: the slots are on a GPU that this process does not see, or the two sides do not agree on the layout.
    """
    require_gpu("the trainer")
    assert shown.cuda_handle is not None
    if shown.num_bytes != num_slots * layout.slot_bytes:
        raise ValueError(
            f"the ring has {shown.num_bytes} bytes where the trainer expects {num_slots * layout.slot_bytes}: install "
            "the same version of feature_bridge in the trainer's and the bridge's environment"
        )
    gpu = find_gpu(shown.gpu_uuid)
    if gpu is not None:
        return CudaMemory(layout, num_slots, gpu, gpu.open(shown.cuda_handle), opened=True)
    seen = ", ".join(Gpu(ordinal).uuid for ordinal in range(num_gpus()))
    raise ValueError(
        f"the bridge's slots are on {shown.gpu_uuid} and the trainer sees only {seen}; "
        "give both the same GPU with CUDA_VISIBLE_DEVICES, or use bridge.transport='shared_memory'"
    )

"""The memory of a ring that two processes share, as DLPack producers: host memory here, a GPU's in `cuda_ipc`.

Order, for every transport: nobody waits on the other side's streams. The worker waits until its own stream is done with
a slot, then the bridge says `Filled`; the trainer waits until the outputs of whatever read the slot are ready, then it
says `Release`. So a slot has one owner at a time, and a capsule needs no event and no stream.

Host memory is a `memfd`: it has no name, so nothing is left behind however the processes end. The bridge makes it, the
trainer gets the file descriptor over the socket, both map it.

A DLPack capsule is made by hand, because numpy refuses bfloat16 and the trainer has no torch. Its struct is one block
of C memory, and its deleter is libc's own `free`: a consumer may call it at any time, on any thread, even after the
interpreter has ended. It frees the struct, never the slot: a slot's bytes belong to the ring.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from feature_bridge.contracts import RingMemory
from feature_bridge.slot_layout import SlotLayout

CPU, CUDA = 1, 2  # DLDeviceType, dlpack.h

_DTYPES = {"int32": (0, 32), "uint8": (1, 8), "float32": (2, 32), "bfloat16": (4, 16)}  # DLDataType: code, bits


class _DLManagedTensor(ctypes.Structure):
    """`DLManagedTensor` of dlpack.h 0.8, flat; on 64-bit machines its padding is the nested structs'."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),  # NULL: C-contiguous
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_CAPSULE_NAME = b"dltensor"  # PyCapsule_New keeps the pointer
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


@dataclass(frozen=True)
class Producer:
    """One array of a slot. `jax.dlpack.from_dlpack` and `torch.from_dlpack` take it, without a copy.

    It does not keep the memory alive: whoever imports it holds a lease of the slot.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    device: tuple[int, int] = (CPU, 0)  # DLDeviceType, device id

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        """A fresh capsule. A slot is published when its bytes are complete, so there is no stream to wait for.

        The capsule has no destructor: one that nobody consumes leaks its struct, about a hundred bytes.
        """
        block = _libc.malloc(ctypes.sizeof(_DLManagedTensor) + 8 * len(self.shape))
        if not block:
            raise MemoryError
        shape = block + ctypes.sizeof(_DLManagedTensor)
        (ctypes.c_int64 * len(self.shape)).from_address(shape)[:] = self.shape
        tensor = _DLManagedTensor.from_address(block)
        tensor.data = self.address
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim = len(self.shape)
        (tensor.code, tensor.bits), tensor.lanes = _DTYPES[self.dtype], 1
        tensor.shape, tensor.strides, tensor.byte_offset = shape, None, 0
        tensor.manager_ctx, tensor.deleter = None, _FREE
        return _new_capsule(block, _CAPSULE_NAME, None)


def slot_arrays(layout: SlotLayout, slot_address: int, device: tuple[int, int]) -> dict[str, Producer]:
    """The arrays of the slot at `slot_address`, by field name."""
    return {f.name: Producer(slot_address + f.offset, f.dtype, f.shape, device) for f in layout.fields}


class SlotMemory(Protocol):
    """What the bridge fills and the trainer reads; one a ring."""

    def arrays(self, slot: int, device_id: int | None = None) -> dict[str, Producer]:
        """A slot's arrays by field name: the worker writes them, the trainer reads them on its device `device_id`."""

    def close(self) -> None:
        """Gives the memory back."""


class HostMemory:
    """`num_slots` slots of `layout` in host memory, page-aligned and contiguous."""

    def __init__(self, layout: SlotLayout, num_slots: int, fd: int):
        """Maps the memory behind `fd`, which stays the caller's."""
        self._layout, self._num_slots = layout, num_slots
        self.num_bytes = num_slots * layout.slot_bytes
        if (actual := os.fstat(fd).st_size) != self.num_bytes:
            raise ValueError(
                f"the ring has {actual} bytes where the trainer expects {self.num_bytes}: install the same version of "
                "feature_bridge in the trainer's and the bridge's environment"
            )
        self._map = mmap.mmap(fd, self.num_bytes)
        # Never unmapped: a JAX array that outlives the ring, at the interpreter's end say, must not point into nowhere.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._map))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def slot_view(self, slot: int) -> memoryview:
        assert 0 <= slot < self._num_slots
        start = slot * self._layout.slot_bytes
        return memoryview(self._map)[start : start + self._layout.slot_bytes]

    def arrays(self, slot: int, device_id: int | None = None) -> dict[str, Producer]:
        assert 0 <= slot < self._num_slots
        return slot_arrays(self._layout, self.address + slot * self._layout.slot_bytes, (CPU, device_id or 0))

    def close(self) -> None:
        """Frees the pages and keeps the addresses: arrays that are still alive read zeros."""
        self._map.madvise(mmap.MADV_REMOVE)


def create_host_memory(layout: SlotLayout, num_slots: int) -> tuple[HostMemory, int]:
    """New, zeroed host memory and its file descriptor, which the caller sends or closes.

    Raises:
      ValueError: it does not fit.
    """
    num_bytes, available = num_slots * layout.slot_bytes, _available_bytes()
    if num_bytes > available:  # asked first: the kernel's own answer is to kill the largest process
        raise ValueError(
            f"bridge.num_slots={num_slots} slots of {layout.slot_bytes / 1e9:.2f} GB do not fit into the "
            f"{available / 1e9:.2f} GB of memory that are free; lower bridge.num_slots, rows_per_device or "
            "data.row_tokens"
        )
    fd = os.memfd_create("feature_bridge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, num_bytes)  # all pages now: no step waits for them
    # Nobody can shrink it under the other's feet.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return HostMemory(layout, num_slots, fd), fd


def _available_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        (kilobytes,) = (line.split()[1] for line in meminfo if line.startswith("MemAvailable:"))
    return 1024 * int(kilobytes)


# --- by transport ----------------------------------------------------------------------------------------------------


def create_memory(
    transport: str, layout: SlotLayout, num_slots: int, slot_gpu: int = 0
) -> tuple[SlotMemory, RingMemory, tuple[int, ...]]:
    """The bridge's side: the memory, the message that shows it to the trainer, file descriptors to send and close.

    Raises:
      ValueError: it does not fit, or the transport has no such memory.
    """
    if transport == "shared_memory":
        memory, fd = create_host_memory(layout, num_slots)
        return memory, RingMemory(num_bytes=memory.num_bytes), (fd,)
    if transport == "cuda_ipc":
        from feature_bridge.cuda_ipc import create_cuda_memory

        return *create_cuda_memory(layout, num_slots, slot_gpu), ()
    raise ValueError(f"bridge.transport={transport!r} is not available in a bridge process; use 'shared_memory'")


def attach_memory(
    transport: str, layout: SlotLayout, num_slots: int, shown: RingMemory, take_fd: Callable[[], int]
) -> SlotMemory:
    """The trainer's side of `create_memory`: from the bridge's message and the file descriptors that came with it.

    Raises:
      ValueError: the two sides do not agree on the layout.
    """
    if transport == "cuda_ipc":
        from feature_bridge.cuda_ipc import attach_cuda_memory

        return attach_cuda_memory(layout, num_slots, shown)
    fd = take_fd()
    try:
        memory = HostMemory(layout, num_slots, fd)
    finally:
        os.close(fd)  # the mapping keeps the memory
    return memory

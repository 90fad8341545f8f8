"""What of `cuda_ipc` shows without a GPU: its message and its refusals. `benchmarks/bridge.py` does the rest."""

from __future__ import annotations

import pytest

from feature_bridge import cuda_ipc, wire
from feature_bridge.contracts import RingMemory, SlotLayout
from feature_bridge.memory import CUDA, attach_memory, create_memory

LAYOUT = SlotLayout(rows=2, row_tokens=37, feature_width=10, feature_dtype="bfloat16")
UUID = "GPU-2860ccc5-632d-30bd-3f23-9c848d4161ff"


class FakeGpu:
    """A GPU whose memory is numbers."""

    def __init__(self, ordinal: int):
        self.ordinal = ordinal
        self.uuid = UUID if ordinal == 1 else "GPU-other"
        self.calls: list[tuple] = []

    def open(self, handle: bytes) -> int:
        self.calls.append(("open", handle))
        return 1 << 40

    def close(self, address: int) -> None:
        self.calls.append(("close", address))

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))


def shown(**fields) -> RingMemory:
    return RingMemory(
        **{"num_bytes": 3 * LAYOUT.slot_bytes, "cuda_handle": bytes(range(64)), "gpu_uuid": UUID} | fields
    )


def attach(message: RingMemory) -> cuda_ipc.CudaMemory:
    return attach_memory("cuda_ipc", LAYOUT, 3, message, take_fd=lambda: pytest.fail("no file descriptor is needed"))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(cuda_ipc, "num_gpus", lambda: 2)
    monkeypatch.setattr(cuda_ipc, "Gpu", FakeGpu)


def test_the_message_survives_the_wire():
    assert wire.decode(wire.encode(shown())) == shown()


def test_without_a_gpu_both_sides_say_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda_ipc, "num_gpus", lambda: 0)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*the bridge sees none; use .*'shared_memory'"):
        create_memory("cuda_ipc", LAYOUT, 2)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*the trainer sees none; use .*'shared_memory'"):
        attach(shown())


def test_slots_are_found_on_the_gpu_with_the_same_uuid(two_gpus):
    memory = attach(shown())
    for slot in range(3):
        for field, producer in zip(LAYOUT.fields, memory.arrays(slot, device_id=1).values(), strict=True):
            assert producer.address == (1 << 40) + slot * LAYOUT.slot_bytes + field.offset
            assert producer.__dlpack_device__() == (CUDA, 1)
            assert (producer.dtype, producer.shape) == (field.dtype, field.shape)
    memory.close()
    assert memory._gpu.calls == [("open", bytes(range(64))), ("synchronize",), ("close", 1 << 40)]


def test_another_gpu_than_the_trainers_is_refused(two_gpus):
    with pytest.raises(ValueError, match=r"slots are on GPU-far and the trainer sees only GPU-other, GPU-2860"):
        attach(shown(gpu_uuid="GPU-far"))
    with pytest.raises(ValueError, match=r"slots lie on GPU 1 and the trainer's device is GPU 0; .*CUDA_VISIBLE"):
        attach(shown()).arrays(0, device_id=0)


def test_two_sides_that_do_not_agree_on_the_layout(two_gpus):
    with pytest.raises(ValueError, match="same version of feature_bridge"):
        attach(shown(num_bytes=LAYOUT.slot_bytes))


class FakeDriver:
    """libcuda with four GPUs; notes whose primary context is retained, which takes memory of that GPU."""

    def __init__(self):
        self.retained: list[int] = []

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = 4
        return 0

    def cuDeviceGet(self, device, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetUuid_v2(self, raw, device) -> int:
        raw[15] = device.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device) -> int:
        self.retained.append(device.value)
        return 0

    def __getattr__(self, name: str):
        return lambda *_: 0


def test_a_gpu_is_looked_for_without_a_context_on_the_others(monkeypatch):
    """Several processes of a host see all of its GPUs, and each of these belongs to one."""
    driver = FakeDriver()
    monkeypatch.setattr(cuda_ipc, "_driver", lambda: driver)
    gpu = cuda_ipc.find_gpu("GPU-00000000-0000-0000-0000-000000000003")
    assert (gpu.ordinal, driver.retained) == (3, [])
    assert cuda_ipc.find_gpu("GPU-far") is None
    gpu.open(bytes(64))
    gpu.synchronize()
    assert driver.retained == [3]  # once

"""The target's embedding and head, lent by CUDA IPC: what shows without a GPU. `benchmarks/bridge.py` does the rest."""

from __future__ import annotations

import pytest

from feature_bridge import cuda_ipc, weights
from feature_bridge.contracts import SharedWeights
from feature_bridge.cuda_ipc import CudaError
from feature_bridge.memory import CUDA, Producer
from feature_bridge.weights import MappedWeights, share

ALLOCATION, MAPPED = 1 << 40, 1 << 41
SHAPE = (11, 3)


class FakeGpu:
    """GPU 1 of two. Its memory is numbers: one allocation of 4096 bytes for every 4096 addresses."""

    calls: list[tuple]
    refuses: str | None = None

    def __init__(self, ordinal: int):
        self.ordinal = ordinal
        self.uuid = f"GPU-{ordinal}"

    def export(self, address: int) -> tuple[bytes, int]:
        if self.refuses == "export":
            raise CudaError("cuIpcGetMemHandle", 1, "CUDA_ERROR_INVALID_VALUE")
        return ((address - ALLOCATION) // 4096).to_bytes(64, "little"), address % 4096

    def open(self, handle: bytes) -> int:
        if self.refuses == "open":
            raise CudaError("cuIpcOpenMemHandle_v2", 201, "CUDA_ERROR_INVALID_CONTEXT")
        self.calls.append(("open", int.from_bytes(handle, "little")))
        return MAPPED + 4096 * int.from_bytes(handle, "little")

    def close(self, address: int) -> None:
        self.calls.append(("close", address))

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    monkeypatch.setattr(cuda_ipc, "num_gpus", lambda: 2)
    for module in (cuda_ipc, weights):
        monkeypatch.setattr(module, "Gpu", FakeGpu)
    monkeypatch.setattr(FakeGpu, "calls", [], raising=False)
    return FakeGpu.calls


def lent(embedding: int, head: int) -> SharedWeights:
    return share(
        "cuda_ipc",
        lambda: {
            "embedding": Producer(ALLOCATION + embedding, "bfloat16", SHAPE, (CUDA, 1)),
            "head": Producer(ALLOCATION + head, "float32", SHAPE, (CUDA, 1)),
        },
    )


@pytest.mark.parametrize(
    ("embedding", "head", "opened"),
    [(0, 8192, [("open", 0), ("open", 2)]), (512, 1024, [("open", 0)]), (512, 512, [("open", 0)])],
)
def test_an_allocation_is_mapped_once_and_unmapped_when_nothing_reads_it(calls, embedding, head, opened):
    mapped = MappedWeights(lent(embedding, head))
    for _ in range(2):
        arrays = mapped.arrays(device_id=1)
    assert arrays["embedding"] == Producer(MAPPED + embedding, "bfloat16", SHAPE, (CUDA, 1))
    assert arrays["head"] == Producer(MAPPED + head, "float32", SHAPE, (CUDA, 1))
    assert calls == opened
    mapped.close()
    mapped.close()
    assert calls[len(opened) :] == [("synchronize",), *[("close", MAPPED + 4096 * number) for _, number in opened]]


def test_why_there_is_none(calls, monkeypatch):
    def no_plain_matrix():
        raise ValueError("the target's head is quantised")

    assert "shares no GPU memory" in share("shared_memory", no_plain_matrix).reason
    for shown, reason in (
        (share("cuda_ipc", no_plain_matrix), "head is quantised"),
        (SharedWeights(**{**vars(lent(0, 0)), "gpu_uuid": "GPU-far"}), "on another GPU"),
    ):
        with pytest.raises(ValueError, match=reason):
            MappedWeights(shown).arrays(1)
    with pytest.raises(ValueError, match="on another GPU"):
        MappedWeights(lent(0, 0)).arrays(0)
    shown = lent(0, 0)
    monkeypatch.setattr(FakeGpu, "refuses", "open")
    with pytest.raises(ValueError, match="cuIpcOpenMemHandle_v2 failed"):
        MappedWeights(shown).arrays(1)
    monkeypatch.setattr(FakeGpu, "refuses", "export")
    assert "cuIpcGetMemHandle failed" in lent(0, 0).reason
    MappedWeights(SharedWeights(reason="no")).close()

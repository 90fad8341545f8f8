"""Which GPUs a bridge sees: the target's first, then the slots'. GPUs are made up."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from feature_bridge.contracts import GpuMemory
from jaxdraft import bridges
from jaxdraft.bridges import Seat, memory_use, open_bridge
from jaxdraft.config import BridgeConfig, Config, DataConfig, TargetConfig
from jaxdraft.sharding import make_mesh

HOST = [f"GPU-{i}" for i in range(4)]


class FakeGpu:
    """The trainer sees GPUs 2 and 3 of the host."""

    def __init__(self, ordinal: int):
        self.uuid = HOST[2 + ordinal]

    def memory_info(self):
        return 5, 100


def device(number: int) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", local_hardware_id=number, memory_stats=lambda: {"bytes_limit": 60})


@pytest.fixture
def opened(monkeypatch):
    """open_bridge(...) -> (spec, environment) of the bridge that would start."""
    devices = [device(0), device(1)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(bridges, "Gpu", FakeGpu)
    monkeypatch.setattr(bridges, "host_gpus", lambda: HOST)
    monkeypatch.setattr(bridges, "num_gpus", lambda: 2)
    monkeypatch.setattr(bridges, "connect", lambda spec, **options: (spec, options["env"]))

    def open_one(number: int, **bridge):
        config = Config(
            name="x",
            target=TargetConfig(path="t"),
            data=DataConfig(train_path="d"),
            bridge=BridgeConfig(**{"transport": "cuda_ipc"} | bridge),
        )
        return open_bridge(config, (0, 1), log_path="log", team=[Seat(devices[number])])

    return open_one


@pytest.mark.parametrize(
    ("number", "gpus", "visible", "slot_gpu"),
    [
        (0, None, "GPU-2", 0),
        (1, None, "GPU-3", 0),
        (0, (0, 1), "GPU-0,GPU-2", 1),
        (1, (0, 1), "GPU-1,GPU-3", 1),
        (1, (0,), "GPU-0,GPU-3", 1),
        (1, (0, 3), "GPU-3", 0),  # its own after all
    ],
)
def test_a_bridge_sees_the_targets_gpu_and_the_slots(opened, number, gpus, visible, slot_gpu):
    spec, env = opened(number, devices=gpus)
    assert env == {"CUDA_VISIBLE_DEVICES": visible}
    assert spec.slot_gpu == slot_gpu


def test_a_process_with_one_of_several_gpus(opened, monkeypatch):
    """Several processes of a host: JAX gives each the GPU of its local index, and each sees all."""
    (second,) = one = [device(1)]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    bridge, data = BridgeConfig(transport="cuda_ipc"), DataConfig(train_path="d")
    config = Config(name="x", target=TargetConfig(path="t"), data=data, bridge=bridge)
    assert open_bridge(config, (0, 1), log_path="log", team=[Seat(second)])[1] == {"CUDA_VISIBLE_DEVICES": "GPU-3"}
    monkeypatch.setattr(bridges, "num_gpus", lambda: 1)  # CUDA_VISIBLE_DEVICES says which, to the bridge as well
    assert open_bridge(config, (0, 1), log_path="log", team=[Seat(second)])[1] == {}


def test_gpus_that_are_not_there(opened):
    with pytest.raises(ValueError, match=r"bridge\.devices has GPU 4, and nvidia-smi lists 4; name one of those"):
        opened(0, devices=(4,))
    with pytest.raises(ValueError, match=r"bridge\.devices=\(1,\) with bridge\.transport='shared_memory'"):
        opened(0, devices=(1,), transport="shared_memory")


@pytest.mark.parametrize(
    ("uuid", "extra"), [("GPU-2", {}), ("GPU-0", {"free on the target's GPU", "the target's whole GPU"})]
)
def test_who_holds_what_of_one_gpu_or_two(monkeypatch, uuid, extra):
    monkeypatch.setattr(bridges, "Gpu", FakeGpu)
    gpu = GpuMemory(uuid=uuid, total=90, free=40, weights=20, reserved=30)
    bridge = SimpleNamespace(ready=SimpleNamespace(gpu=gpu), transport="cuda_ipc", num_slots=3, ring_bytes=7)
    use = memory_use(bridge, device(0))
    assert {
        "target: weights": 20,
        "bridge: 3 slots": 7,
        "trainer: JAX": 60,
        "free": 5,
        "the whole GPU": 100,
    }.items() <= use.items()
    assert {name for name in use if "target's" in name} == set(extra)


def test_a_bridge_that_is_refused_does_not_wait_for_the_others(monkeypatch):
    ended, closed = threading.Event(), []
    began = time.monotonic()

    def open_one(config, layer_ids, *, log_path, team):
        if team[0].rows == 1:
            ended.wait(60)  # loads its target
        if team[0].rows == 2:
            raise ValueError("the target needs more memory")
        return contextlib.closing(SimpleNamespace(close=lambda: closed.append(team[0].rows)))

    monkeypatch.setattr(bridges, "open_bridge", open_one)
    config = Config(name="x", target=TargetConfig(path="t"), data=DataConfig(train_path="d"))
    with (
        pytest.raises(ValueError, match="more memory"),
        bridges.open_bridges(config, (0, 1), make_mesh(data=3, devices=jax.devices()[:3]), ["0", "1", "2"]),
    ):
        pass
    assert time.monotonic() - began < 30
    assert closed == [0]
    ended.set()

"""The stream of slots: whose memory, whose bytes, how many at a time, and what a release means."""

import dataclasses
import functools
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_worker import CRASH, FakeWorker, field_values, make_spec

import jaxdraft.bridges
from feature_bridge.client import connect
from feature_bridge.contracts import Row, SlotLayout
from feature_bridge.in_process import InProcessClient
from feature_bridge.restart import RestartingClient
from jaxdraft.bridges import BridgeError, make_bridge_spec, open_bridge, seats
from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.features import FeatureStream
from jaxdraft.objective import batch_shardings
from jaxdraft.run import Request
from jaxdraft.sharding import make_mesh

SPEC = make_spec(rows=2, row_tokens=19, num_slots=3)
ENV = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def connect_fake(spec, *, env=None, **options):
    return connect(spec, worker="fake_worker:FakeWorker", env=ENV | (env or {}), **options)


BORROWED = ("row_ids", "num_tokens", "tokens", "segment_start", "loss_mask", "features")


def inside(spec=SPEC):
    return InProcessClient(spec, FakeWorker(spec))


@pytest.fixture(params=["shared_memory", "in_process"])
def bridge(request, tmp_path):
    client = connect_fake(SPEC, log_path=tmp_path / "log") if request.param == "shared_memory" else inside()
    with client:
        yield client


def make_requests(count, rows=2, first=0):
    return [Request("train", tuple((first + i * rows + j, (i, j)) for j in range(rows))) for i in range(count)]


def expected(request: Request, spec=SPEC) -> dict[str, np.ndarray]:
    """What the fake worker writes for this request, as float64 by field."""
    rows = tuple(Row(row_id=row_id, samples=samples) for row_id, samples in request.rows)
    layout = SlotLayout(spec.rows_per_slot, spec.row_tokens, 6, spec.feature_dtype)
    return {f.name: np.asarray(field_values(f, rows), np.float64).reshape(f.shape) for f in layout.fields}


def check(slot, request: Request) -> None:
    for name, values in expected(request).items():
        np.testing.assert_array_equal(np.asarray(getattr(slot.batch, name).astype(jnp.float32)), values, err_msg=name)
    np.testing.assert_array_equal(slot.batch.row_ids, [row_id for row_id, _ in request.rows])
    np.testing.assert_array_equal(slot.batch.num_tokens, [len(samples) for _, samples in request.rows])
    assert [(row.row_id, row.samples) for row in slot.rows] == list(request.rows)


def test_a_batch_is_the_slots_own_memory(bridge):
    requests = make_requests(7)
    stream = FeatureStream(bridge, requests)
    seen = set()
    for slot, request in zip(stream, requests, strict=True):
        check(slot, request)
        (filled,) = slot.filled
        base = bridge._memory.address
        for name, producer in bridge.slot(filled).items():
            address = getattr(slot.batch, name).unsafe_buffer_pointer()
            assert address == producer.address
            assert base <= address < base + bridge._memory.num_bytes
        dtypes = {name: getattr(slot.batch, name).dtype for name in BORROWED}
        assert dtypes == dict(zip(BORROWED, 4 * (jnp.int32,) + (jnp.uint8, jnp.bfloat16), strict=True))
        seen.add(filled.slot)
        stream.release(slot.filled)
    assert seen == {0, 1, 2}
    assert stream.seconds_waiting > 0
    assert next(stream, None) is None


def test_a_loop_that_releases_a_step_late(bridge):
    """As the trainer does: the slot of a step goes back when the step's outputs are ready, while the next step runs."""
    requests = make_requests(40)
    stream = FeatureStream(bridge, requests)

    @jax.jit
    def step(total, batch):
        return total + batch.features.astype(jnp.float32).sum() + batch.tokens.sum(), batch.row_ids.sum()

    total, previous = jnp.float32(0), None
    for slot in stream:
        total, metric = step(total, slot.batch)
        if previous is not None:
            jax.block_until_ready(previous[1])  # the outputs of one computation are ready together
            stream.release(previous[0].filled)
        previous = (slot, metric)
    truth = sum(values[name].sum() for values in map(expected, requests) for name in ("features", "tokens"))
    assert float(total) == truth


def test_a_slot_of_a_dead_bridge_is_no_view_of_the_next_ones(tmp_path):
    """Released last of all, it does not stand in for the new bridge's slot of the same number."""
    start = functools.partial(connect_fake, SPEC, log_path=tmp_path / "log")
    with RestartingClient(start, 1, lambda _: None) as bridge:
        requests = make_requests(16)
        stream = FeatureStream(bridge, requests)
        old = next(stream)
        number = old.filled[0].slot
        os.kill(bridge.pid, signal.SIGKILL)
        numbers = []
        for request in requests[1:]:
            slot = next(stream)
            check(slot, request)
            addresses = {name: producer.address for name, producer in bridge.slot(slot.filled[0]).items()}
            assert addresses == {name: getattr(slot.batch, name).unsafe_buffer_pointer() for name in BORROWED}
            stream.release(slot.filled)
            if bridge.life == 1:
                numbers.append(slot.filled[0].slot)
                if numbers.count(number) == 1 and numbers[-1] == number:
                    stream.release(old.filled)
        assert numbers.count(number) >= 2


def test_no_more_than_num_slots_are_under_way(bridge):
    taken = []

    def requests():
        for request in make_requests(9):
            taken.append(request)
            yield request

    stream = FeatureStream(bridge, requests())
    held = [next(stream) for _ in range(3)]
    assert len(taken) == 3
    with pytest.raises(AssertionError, match="every slot is borrowed"):
        next(stream)
    for slot, request in zip(held, taken, strict=True):  # none was overwritten meanwhile
        check(slot, request)
    stream.release(held[1].filled)  # in any order; the next one is asked for at once
    assert len(taken) == 4
    fourth = next(stream)
    assert fourth.filled[0].slot == held[1].filled[0].slot
    assert fourth.filled[0].generation == held[1].filled[0].generation + 1
    check(held[0], taken[0])
    check(held[2], taken[2])
    check(fourth, taken[3])


def test_a_released_slot_cannot_be_used(bridge):
    stream = FeatureStream(bridge, make_requests(2))
    slot = next(stream)
    stream.release(slot.filled)
    for name in BORROWED:
        with pytest.raises(RuntimeError, match="deleted"):
            getattr(slot.batch, name) + 1
    with pytest.raises(KeyError):
        stream.release(slot.filled)


def test_devices_that_share_rows_have_a_part_of_their_features_each():
    """On a (2, 1, 2) mesh: one slot a device, two of them with the same rows, and no device has all the features."""
    spec = dataclasses.replace(SPEC, row_tokens=20)
    mesh = make_mesh(data=2, tensor=2, devices=jax.local_devices()[:4])
    bridges = [inside(dataclasses.replace(spec, feature_slice=seat.feature_slice)) for seat in seats(mesh)]
    requests = make_requests(4, rows=4)
    stream = FeatureStream(bridges, requests, mesh)
    for slot, request in zip(stream, requests, strict=True):
        assert [row.row_id for row in slot.rows] == [row_id for row_id, _ in request.rows]
        assert slot.batch.features.shape == (4, 20, 6)
        for seat, bridge, filled in zip(seats(mesh), bridges, slot.filled, strict=True):
            part = Request("train", request.rows[2 * seat.rows : 2 * seat.rows + 2])
            for name, values in expected(part, spec).items():
                if name == "features":
                    values = np.split(values, 2, axis=1)[seat.feature_slice[0]]
                (shard,) = (s for s in getattr(slot.batch, name).addressable_shards if s.device == seat.device)
                assert shard.data.unsafe_buffer_pointer() == bridge.slot(filled)[name].address
                np.testing.assert_array_equal(np.asarray(shard.data.astype(jnp.float32)), values, err_msg=name)
        stream.release(slot.filled)


def test_a_process_asks_for_the_rows_of_its_own_devices_only():
    """`seats` leaves out other processes' devices; what is asked of each bridge is its own group of rows."""

    class Elsewhere(NamedTuple):
        process_index: int

    own = jax.local_devices()[:4]
    devices = np.array([Elsewhere(1), Elsewhere(1), *own[:2], Elsewhere(2), Elsewhere(2), *own[2:]], object)
    mesh = SimpleNamespace(devices=devices.reshape(2, 2, 2), shape={"data": 2, "fsdp": 2, "tensor": 2})
    assert seats(mesh) == [(own[0], 1, (0, 2)), (own[1], 1, (1, 2)), (own[2], 3, (0, 2)), (own[3], 3, (1, 2))]
    asked = []
    bridge = SimpleNamespace(
        num_ranks=1, num_slots=2, fill=lambda split, rows: asked.append([row.row_id for row in rows])
    )
    stream = FeatureStream([bridge] * 4, make_requests(1, rows=12), mesh)
    stream._ask()
    assert asked == [[3, 4, 5], [3, 4, 5], [9, 10, 11], [9, 10, 11]]


def test_one_bridge_for_each_device():
    """A global batch whose shards are the slots of four bridges, in the mesh's order of devices."""
    devices = jax.local_devices()[4:8][::-1]
    mesh = make_mesh(data=2, fsdp=2, devices=devices)
    bridges = [inside() for _ in devices]
    requests = make_requests(5, rows=8)
    stream = FeatureStream(bridges, requests, mesh)
    for slot, request in zip(stream, requests, strict=True):
        assert slot.batch.features.sharding.is_equivalent_to(batch_shardings(mesh).features, 3)
        np.testing.assert_array_equal(slot.batch.row_ids, [row_id for row_id, _ in request.rows])
        assert [row.row_id for row in slot.rows] == [row_id for row_id, _ in request.rows]
        for d, (bridge, filled) in enumerate(zip(bridges, slot.filled, strict=True)):
            part = Request("train", request.rows[2 * d : 2 * d + 2])
            for name, values in expected(part).items():
                array = getattr(slot.batch, name)
                (shard,) = (s for s in array.addressable_shards if s.device == devices[d])
                assert shard.data.unsafe_buffer_pointer() == bridge.slot(filled)[name].address
                np.testing.assert_array_equal(np.asarray(shard.data.astype(jnp.float32)), values)
        jax.block_until_ready(jax.jit(jnp.sum)(slot.batch.features))
        stream.release(slot.filled)


def test_a_request_that_fails(bridge):
    first, second = make_requests(2)
    stream = FeatureStream(bridge, [first, dataclasses.replace(second, split="eval")])
    check(next(stream), first)
    with pytest.raises(BridgeError, match=r"^data\.eval_path=None: there is nothing held out") as caught:
        next(stream)
    assert not caught.value.retryable


def test_a_bridge_that_dies(tmp_path):
    with connect_fake(SPEC, log_path=tmp_path / "log") as bridge:
        stream = FeatureStream(bridge, [*make_requests(1), Request("train", ((8, (CRASH,)), (9, ())))])
        held = next(stream)
        with pytest.raises(BridgeError, match="ended with exit code 7"):
            next(stream)
        check(held, make_requests(1)[0])  # the memory is the trainer's as well
        with pytest.raises(BridgeError, match="exit code 7"):
            stream.release(held.filled)


CONFIG = Config(
    name="test",
    target=TargetConfig(
        path="some/target", revision="abc", backend="huggingface", dtype="float32", trust_remote_code=True
    ),
    data=DataConfig(
        train_path="train.jsonl",
        eval_path="eval.jsonl",
        eval_fraction=0.25,
        row_tokens=160,
        too_long="drop",
        min_pixels=16,
        max_pixels=64,
        video_fps=3.0,
        video_max_frames=12,
        video_min_pixels=32,
        video_max_pixels=128,
        num_workers=3,
        cache_dir="cache",
    ),
    draft=DraftOptions(block_size=8),
    bridge=BridgeConfig(num_slots=4, feature_dtype="float32", sglang_args={"x": 1}, verify=False, cuda_graphs=False),
    rows_per_device=3,
)


@pytest.mark.parametrize(
    ("transport", "asked", "number"), [("shared_memory", None, 0), ("cuda_ipc", None, 4), ("cuda_ipc", 0, 0)]
)
def test_processes_that_read_are_for_a_gpu_unless_asked_for(transport, asked, number):
    bridge = BridgeConfig(transport=transport, reader_processes=asked)
    assert make_bridge_spec(dataclasses.replace(CONFIG, bridge=bridge), (0, 2)).reader_processes == number


def test_the_spec_says_what_the_config_says():
    spec = make_bridge_spec(CONFIG, (0, 2))
    assert dataclasses.asdict(spec.target) == {
        "path": "some/target",
        "revision": "abc",
        "backend": "huggingface",
        "dtype": "float32",
        "layer_ids": (0, 2),
        "trust_remote_code": True,
        "sglang_args": {"x": 1},
        "verify": False,
        "cuda_graphs": False,
    }
    assert dataclasses.asdict(spec.data) == {
        "train_path": "train.jsonl",
        "eval_path": "eval.jsonl",
        "eval_fraction": 0.25,
        "max_length": 160,
        "too_long": "drop",
        "min_supervised": 16,
        "min_pixels": 16,
        "max_pixels": 64,
        "video_fps": 3.0,
        "video_max_frames": 12,
        "video_min_pixels": 32,
        "video_max_pixels": 128,
        "num_workers": 3,
        "cache_dir": "cache",
    }
    assert (spec.rows_per_slot, spec.row_tokens, spec.num_slots) == (3, 160, 4)
    assert (spec.feature_dtype, spec.transport) == ("float32", "shared_memory")


@pytest.mark.parametrize("transport", ["shared_memory", "in_process"])
def test_open_bridge(monkeypatch, tmp_path, transport):
    monkeypatch.setattr(jaxdraft.bridges, "connect", connect_fake)
    monkeypatch.setattr(jaxdraft.bridges, "DEFAULT_WORKER", "fake_worker:FakeWorker")
    config = dataclasses.replace(CONFIG, bridge=dataclasses.replace(CONFIG.bridge, transport=transport))
    requests = make_requests(2, rows=3)
    with open_bridge(config, (0, 2), log_path=tmp_path / "run" / "bridge.log") as bridge:
        assert (bridge.pid == os.getpid()) == (transport == "in_process")
        assert bridge.ready.feature_width == 6
        for slot in FeatureStream(bridge, requests):
            assert slot.batch.features.shape == (3, 160, 6)
            assert slot.batch.features.dtype == jnp.float32


def test_a_transport_that_is_not_there(tmp_path):
    config = dataclasses.replace(CONFIG, bridge=BridgeConfig(transport="cuda_ipc"))
    with pytest.raises(ValueError, match=r"bridge\.transport='cuda_ipc' needs JAX on a GPU.*shared_memory"):
        open_bridge(config, (0, 2), log_path=tmp_path / "log")

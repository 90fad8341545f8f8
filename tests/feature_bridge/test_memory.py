"""A slot's bytes are one memory for everybody: both processes, JAX, torch. And it outlives whoever looks at it."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from feature_bridge.contracts import SlotLayout
from feature_bridge.memory import HostMemory, Producer, create_host_memory, create_memory

LAYOUT = SlotLayout(rows=2, row_tokens=37, feature_width=10, feature_dtype="bfloat16")
FEATURES = LAYOUT.fields[-1]


@pytest.fixture
def memory():
    memory, fd = create_host_memory(LAYOUT, 3)
    yield memory, fd
    os.close(fd)


def to_jax(producer):
    return jax.dlpack.from_dlpack(producer, copy=False)


@pytest.mark.parametrize("slot", [0, 2])
def test_jax_sees_the_bytes_without_a_copy(memory, slot):
    memory, _ = memory
    arrays = {name: to_jax(p) for name, p in memory.arrays(slot).items()}
    dtypes = dict.fromkeys(("row_ids", "num_tokens", "tokens", "segment_start"), jnp.int32)
    dtypes |= {"loss_mask": jnp.uint8, "features": jnp.bfloat16}
    assert {name: a.dtype for name, a in arrays.items()} == dtypes
    for field in LAYOUT.fields:
        assert arrays[field.name].shape == field.shape
        assert arrays[field.name].unsafe_buffer_pointer() == memory.address + slot * LAYOUT.slot_bytes + field.offset
    values = torch.randn(FEATURES.shape).to(torch.bfloat16)
    torch.frombuffer(memory.slot_view(slot), dtype=torch.bfloat16, offset=FEATURES.offset, count=values.numel()).copy_(
        values.flatten()
    )
    np.testing.assert_array_equal(np.asarray(arrays["features"].astype(jnp.float32)), values.float().numpy())


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "bfloat16"])
def test_torch_sees_what_jax_sees(memory, dtype):
    memory, _ = memory
    memory.slot_view(0)[:64] = np.random.default_rng().integers(0, 64, 64).astype(np.uint8).tobytes()
    producer = Producer(memory.address, dtype, (2, 5))
    seen = torch.from_dlpack(producer)
    assert seen.data_ptr() == memory.address
    assert str(seen.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(seen.float().numpy(), np.asarray(to_jax(producer).astype(jnp.float32)))


def test_another_process_writes_the_same_memory(memory):
    memory, fd = memory
    code = f"""
        import sys
        from feature_bridge.contracts import SlotLayout
        from feature_bridge.memory import HostMemory
        view = HostMemory({LAYOUT!r}, 3, {fd}).slot_view(1)
        view[:] = bytes([int(sys.argv[1])]) * len(view)
    """
    loss_mask = to_jax(memory.arrays(1)["loss_mask"])
    for value in (3, 4):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(value)], pass_fds=[fd], check=True)
        assert (np.asarray(loss_mask) == value).all()
    assert bytes(memory.slot_view(0)) == bytes(memory.slot_view(2)) == bytes(LAYOUT.slot_bytes)


def test_each_virtual_device_maps_without_a_copy(memory):
    memory, _ = memory
    for device in jax.local_devices():
        row_ids = to_jax(memory.arrays(1, device.local_hardware_id)["row_ids"])
        assert row_ids.devices() == {device}
        assert row_ids.unsafe_buffer_pointer() == memory.address + LAYOUT.slot_bytes


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_xla_neither_aliases_nor_reuses_a_slot(memory):
    """Not even for a donated batch, or for an output that is an input: both would write into borrowed memory."""
    memory, _ = memory
    start, end = memory.address, memory.address + memory.num_bytes
    memory.slot_view(0)[:] = np.random.default_rng().integers(0, 60, LAYOUT.slot_bytes).astype(np.uint8).tobytes()
    before = bytes(memory.slot_view(0))
    for function in (lambda x: x + 1, lambda x: x, lambda x: (x, x * 2), lambda x: x.reshape(-1), lambda x: x[:1]):
        for donate in ((), (0,)):
            for producer in memory.arrays(0).values():
                outputs = jax.block_until_ready(jax.jit(function, donate_argnums=donate)(to_jax(producer)))
                for output in jax.tree.leaves(outputs):
                    assert not start <= output.unsafe_buffer_pointer() < end
    assert bytes(memory.slot_view(0)) == before


def test_arrays_that_outlive_the_ring_read_zeros():
    memory, fd = create_host_memory(LAYOUT, 2)
    os.close(fd)
    memory.slot_view(1)[:] = b"\x01" * LAYOUT.slot_bytes
    mask = to_jax(memory.arrays(1)["loss_mask"])
    assert np.asarray(mask).all()
    memory.close()
    del memory
    gc.collect()
    assert not np.asarray(mask).any()


def test_importing_many_times_leaks_nothing(memory):
    """The deleter frees each capsule's struct: 100,000 of them would take 10 MB."""
    memory, _ = memory

    def resident_mb():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def import_many(count):
        producer = memory.arrays(0)["tokens"]
        for _ in range(count):
            torch.from_dlpack(producer)

    import_many(1000)
    before = resident_mb()
    import_many(100_000)
    assert resident_mb() - before < 5


def test_arrays_alive_at_the_interpreters_end():
    code = """
        import jax, sys
        from feature_bridge.contracts import SlotLayout
        from feature_bridge.memory import create_host_memory
        memory, fd = create_host_memory(SlotLayout(2, 37, 10, "bfloat16"), 2)
        arrays = [jax.dlpack.from_dlpack(p, copy=False) for p in memory.arrays(1).values()]
        jax.keep = arrays, jax.jit(lambda x: [a.sum() for a in x])(arrays)
        print("torch" in sys.modules, "numpy" in sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_trainers_side_needs_neither_jax_nor_torch_nor_numpy():
    code = "import sys, feature_bridge.client; print({'jax', 'torch', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_memory_cannot_be_shrunk(memory):
    memory, fd = memory
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 0)


def test_what_does_not_fit_is_one_sentence():
    huge = SlotLayout(rows=1 << 20, row_tokens=1 << 20, feature_width=1 << 12, feature_dtype="float32")
    with pytest.raises(ValueError, match=r"bridge.num_slots=2 slots of .* GB do not fit .*; lower bridge.num_slots"):
        create_host_memory(huge, 2)
    with pytest.raises(ValueError, match="bridge.transport='in_process' is not available"):
        create_memory("in_process", LAYOUT, 2)


def test_two_sides_that_disagree_on_the_layout(memory):
    _, fd = memory
    with pytest.raises(ValueError, match="install the same version of feature_bridge"):
        HostMemory(SlotLayout(2, 64, 10, "bfloat16"), 3, fd)


def test_a_capsule_frees_its_own_struct(memory):
    """The deleter is libc's free, so that it may run after the interpreter has ended."""
    memory, _ = memory
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    block = get_pointer(memory.arrays(0)["tokens"].__dlpack__(stream=None, max_version=(1, 0)), b"dltensor")
    deleter = ctypes.c_void_p.from_address(block + 56).value
    assert deleter == ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p).value
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(block)

"""Any split of a mesh, in one process or two, computes the same numbers, with the collectives that are meant and no
others; a checkpoint of any of them is the same bits on any other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest
from mesh_steps import (
    ACROSS,
    ANCHORS,
    CONFIG,
    ROW_TOKENS,
    ROWS,
    STEP,
    prepare,
    restore,
    run,
    save,
)

from jaxdraft.ops.hopper import why_no_kernels
from jaxdraft.sharding import MESH_AXES, make_mesh, on_mesh, per_device

MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (4, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)]


def assert_same_steps(losses: Sequence[float], gradients: dict[str, np.ndarray]) -> None:
    """As on one device: loss and every gradient of the first step to 1e-5, the losses of 20 steps to 1e-4."""
    single = run(None)
    np.testing.assert_allclose(losses[0], single.losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses, single.losses, rtol=1e-4)
    assert len(losses) == 20
    assert single.losses[-1] < 0.9 * single.losses[0]
    for name, expected in single.gradients.items():
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_same_numbers_on_any_mesh(sizes):
    assert_same_steps(run(sizes).losses, run(sizes).gradients)


@pytest.fixture(scope="module")
def across(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray], list[float]]:
    """What two processes of four devices wrote, given a checkpoint of one device; its leaves and next losses."""
    directory = tmp_path_factory.mktemp("across")
    leaves, losses = save(directory / "saved", prepare(None))
    script = Path(__file__).with_name("mesh_steps.py")
    ended = processes.finish(processes.start([script, directory], devices=4, processes=2))
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-3000:] for _, output in ended)
    return directory, leaves, losses


@pytest.mark.parametrize("axis", ACROSS)
def test_same_numbers_in_two_processes(across, axis):
    """Whichever axis lies across the processes."""
    with np.load(across[0] / f"{axis}.npz") as theirs:
        assert_same_steps(theirs["losses"], theirs)


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    names = set(theirs) - {"losses"}
    assert names == set(ours) - {"losses"}
    for name in names:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_one_devices_checkpoint_in_two_processes(across):
    directory, leaves, losses = across
    with np.load(directory / "restored.npz") as theirs:
        assert_same_bits(theirs, leaves)
        np.testing.assert_allclose(theirs["losses"], losses, rtol=1e-5)


@pytest.mark.parametrize("sizes", [None, (1, 2, 2), (1, 1, 2)], ids=str)
def test_two_processes_checkpoint_on_any_mesh(across, sizes):
    """Saved on (2, 2, 2) by two processes."""
    restored, losses = restore(across[0] / "across", prepare(sizes))
    with np.load(across[0] / "saved.npz") as theirs:
        assert_same_bits(restored, theirs)
        np.testing.assert_allclose(losses, theirs["losses"], rtol=1e-5)


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of everything that the compiled step sends between devices; shapes are a device's own."""
    return {
        (kind, tuple(int(size) for size in shape.split(",") if size))
        for shapes, kind in COLLECTIVE.findall(hlo)
        for _, shape in SHAPE.findall(shapes)
    }


def parameter_shapes(sizes, *, split: Sequence[str]) -> set[tuple[int, ...]]:
    """The shape of each parameter divided by these mesh axes."""
    counts = dict(zip(MESH_AXES, sizes, strict=True))
    shapes = set()
    for name, spec in run(sizes).parts.items():
        shape = run(sizes).gradients[name].shape
        axes = [*spec, *[None] * len(shape)][: len(shape)]
        shapes.add(tuple(n // (counts[axis] if axis in split else 1) for n, axis in zip(shape, axes, strict=True)))
    return shapes


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_only_the_expected_collectives(sizes):
    found = collectives(run(sizes).hlo)
    data, fsdp, tensor = sizes
    rows, b, h = ROWS // (data * fsdp), CONFIG.block_size, CONFIG.hidden_size
    predicted = (rows, ANCHORS * (b - 1))  # of the cross entropy, one for each predicted slot
    weights, shards = (parameter_shapes(sizes, split=axes) for axes in (("tensor",), ("fsdp", "tensor")))
    bad_rows, sums = (ROWS,), {(), (2,), (b - 1,)}
    context, blocks = (rows, ROW_TOKENS, h), {(rows, ANCHORS, n, h) for n in (2, b, b - 1)}  # in, within, out
    # Keys and values of the context: every layer's weights in one product.
    kv = 2 * CONFIG.num_layers
    weights, shards = (
        x | {(kv, *shape) for s in x if len(s) == 3 for shape in (s, (*s[1:], s[0]))} for x in (weights, shards)
    )

    # What each mesh axis is expected to send.
    gathers, reduces, permutes = {bad_rows}, weights | shards | sums, set()
    if fsdp > 1:
        gathers |= weights  # just before use
    if tensor > 1:
        gathers |= {context}  # c, K times smaller than the features
        reduces |= blocks | {context}  # row-parallel products
        reduces |= {predicted, (*predicted, h), (rows,)}  # statistics of logits
        reduces |= {(rows, ANCHORS, h), (1, h)}  # embeddings, the vocabulary being split
        permutes |= {(1, h)}  # MASK's
    allowed = {"all-gather": gathers, "all-reduce": reduces, "collective-permute": permutes}
    surprises = {(kind, shape) for kind, shape in found if shape not in allowed.get(kind, ())}
    assert not surprises
    if tensor > 1:
        assert ("all-gather", context) in found
    if fsdp > 1:
        assert {shape for kind, shape in found if kind == "all-gather"} >= {
            shape for shape in weights if 1 < len(shape) < 4
        }


@pytest.mark.parametrize("float32_gradients", [False, True])
def test_weights_and_gradients_are_sent_in_the_compute_dtype(tmp_path, float32_gradients):
    """Gradients unless float32 is asked for. Read behind XLA's partitioner: later, a CPU turns bfloat16 into float32,
    which a GPU does not."""
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    options = dataclasses.replace(STEP, compute_dtype="bfloat16", float32_gradients=float32_gradients)
    prepare((1, 2, 1), options=options, compiler_options=tuple(dump.items()))
    (file,) = tmp_path.glob("*train_step*after_spmd-partitioning*.txt")
    weights = {",".join(map(str, shape)) for shape in parameter_shapes((1, 2, 1), split=("tensor",)) if len(shape) > 1}
    for kind, expected in (("all-gather", "bf16"), ("all-reduce", "f32" if float32_gradients else "bf16")):
        sent = re.findall(rf" = (\w+)\[([\d,]+)\]\S* {kind}\(", file.read_text())
        assert {shape for _, shape in sent} >= weights
        assert {dtype for dtype, shape in sent if shape in weights} == {expected}


def test_kernels_run_where_a_device_has_its_own_part(monkeypatch):
    """On several GPUs within `per_device` alone; on a mesh of one of them everywhere."""
    hopper = SimpleNamespace(compute_capability="9.0")
    for name, value in {
        "default_backend": lambda: "gpu",
        "__version_info__": (0, 11, 0),
        "local_devices": lambda: [hopper],
        "device_count": lambda: 2,
    }.items():
        monkeypatch.setattr(jax, name, value)

    def ask(mesh, auto=None):
        seen = []

        def note(x):
            seen.append(why_no_kernels())
            return x

        def both(x):
            return per_device(note, [("rows",)], ("rows",), auto=auto)(note(x))

        jax.eval_shape(on_mesh(mesh)(both), jax.ShapeDtypeStruct((8, 4), "float32"))
        return [reason is None for reason in seen]

    devices = jax.devices()
    assert ask(make_mesh(devices=devices[:1])) == [True, True]
    assert ask(make_mesh(data=2, devices=devices[:2])) == [False, True]
    assert ask(make_mesh(data=2, devices=devices[:2]), auto="tensor") == [False, True]
    assert ask(make_mesh(data=2, tensor=2, devices=devices[:4])) == [False, True]
    # A loop that XLA itself splits over tensor is no place for a kernel.
    assert ask(make_mesh(data=2, tensor=2, devices=devices[:4]), auto="tensor") == [False, False]
    assert ask(None) == [False, False]
    assert why_no_kernels(alone=True) is None  # as a run says at its start of what its step will do

"""The bridge's side of the parity gate: what a system's class raises is that system's verdict, at every moment."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from feature_bridge import check as gate
from feature_bridge import wire
from feature_bridge.contracts import Check

FIELDS = {"block_size": 3, "mask_token_id": 7, "target_layer_ids": [1, 2]}
MOMENTS = ("construct", "version", "fields", "weights", "run", "save")


class Odd(BaseException):
    """What a class may raise that is no `Exception`."""


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text either")


class FakeTarget:
    def embed(self, tokens):
        return torch.tensor(tokens, dtype=torch.float32)[:, None].repeat(1, 4)


class FakeSystem:
    """A draft whose class raises `error` at one moment; "save": it gives what no file can hold."""

    def __init__(self, moment=None, error=None, **attributes):
        self._moment, self._error, self._attributes = moment, error, attributes
        self._reach("construct")

    def _reach(self, moment):
        if moment == self._moment:
            raise self._error

    @property
    def version(self):
        self._reach("version")
        return self._attributes.get("version", "fake 1.0")

    @property
    def fields(self):
        self._reach("fields")
        return self._attributes.get("fields", FIELDS)

    def weights(self):
        self._reach("weights")
        return self._attributes.get("weights", {"fc.weight": torch.ones(2, 2)})

    def __call__(self, embedding_bh, features_aw):
        self._reach("run")
        return embedding_bh + features_aw.sum()


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """A request for the systems given by name; the blocks of one conversation are in its file."""
    inputs = {
        "0.tokens": torch.arange(5, dtype=torch.int32),
        "0.features": torch.ones(5, 6),
        "0.anchors": torch.tensor([1, 3], dtype=torch.int32),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")

    def make(**systems):
        monkeypatch.setattr(gate, "SYSTEMS", {name: lambda *_, make=make: make() for name, make in systems.items()})
        path = str(tmp_path / "inputs.safetensors")
        return Check(request_id=1, draft_path=str(tmp_path), inputs_path=path, systems=tuple(systems))

    return make


def checked(request):
    """The verdicts, as they come out of the connection: so they can be sent."""
    answer = gate.check(FakeTarget(), request)
    return {system.name: system for system in wire.decode(wire.encode(answer)).systems}


def errors():
    return {
        "RuntimeError": (
            RuntimeError("CUDA error: an illegal\n  memory access"),
            "CUDA error: an illegal memory access",
        ),
        "AttributeError": (AttributeError("no attribute 'draft_config'"), "no attribute 'draft_config'"),
        "AssertionError": (AssertionError(), ""),
        "SystemExit": (SystemExit(3), "3"),
        "GeneratorExit": (GeneratorExit("gone"), "gone"),
        "Odd": (Odd("odd"), "odd"),
        "Mute": (Mute(), ""),
        "OutOfMemoryError": (torch.OutOfMemoryError("Tried to allocate"), "Tried to allocate"),
        "ValueError": (ValueError("a lone \ud800 surrogate"), "a lone ? surrogate"),
    }


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", errors())
def test_what_a_class_raises_is_its_verdict(moment, name, request_of, monkeypatch):
    """The systems after it run, and the bridge answers."""
    error, text = errors()[name]
    if moment == "save":
        real = gate.save_file

        def save(tensors, path):
            if path.name.startswith("bad"):
                raise error
            real(tensors, path)

        monkeypatch.setattr(gate, "save_file", save)
    found = checked(request_of(bad=lambda: FakeSystem(moment, error), good=FakeSystem))
    assert found["bad"].status == "failed"
    assert found["bad"].note == (f"{name}: {text}" if text else name)
    assert found["bad"].outputs_path is None
    knows_itself = moment in ("run", "save", "version")
    assert (found["bad"].fields, bool(found["bad"].weights)) == ((FIELDS, True) if knows_itself else ({}, False))
    assert found["good"].status == "ran"
    blocks = load_file(found["good"].outputs_path)["0"]
    np.testing.assert_array_equal(blocks[:, :, 0], [[7, 13, 13], [21, 25, 25]])  # embeddings + 6 features a token


def unusable():
    return {
        "a field that is no plain value": (
            {"fields": FIELDS | {"block_size": torch.tensor(3)}},
            "TypeError: Encoding objects of type Tensor",
        ),
        "a field that is missing": ({"fields": {"block_size": 3}}, "KeyError: 'mask_token_id'"),
        "no fields": ({"fields": None}, "ValidationError: "),
        "a weight that is no tensor": ({"weights": {"fc.weight": None}}, "AttributeError: "),
        "weights in a list": ({"weights": []}, "AttributeError: "),
    }


@pytest.mark.parametrize("name", unusable())
def test_what_a_class_gives_is_looked_at(name, request_of):
    attributes, note = unusable()[name]
    found = checked(request_of(bad=lambda: FakeSystem(**attributes), good=FakeSystem))
    assert found["bad"].status == "failed"
    assert found["bad"].note.startswith(note)
    assert found["good"].status == "ran"


def test_what_is_not_there_is_no_failure(request_of):
    def absent():
        raise ModuleNotFoundError("No module named 'peer'")

    def refuses():
        raise gate.NotRun("another back end")

    found = checked(request_of(absent=absent, refuses=refuses, late=lambda: FakeSystem("run", ImportError("kernel"))))
    assert (found["absent"].status, found["absent"].note) == ("not installed", "No module named 'peer'")
    assert (found["refuses"].status, found["refuses"].note) == ("not run", "another back end")
    assert (found["late"].status, found["late"].note) == ("failed", "ImportError: kernel")  # it was installed


def test_an_endless_text_is_cut(request_of):
    found = checked(request_of(bad=lambda: FakeSystem("run", RuntimeError("x " * 9999))))
    assert len(found["bad"].note) < gate.MAX_NOTE + 50


def test_a_user_can_still_stop_it(request_of):
    with pytest.raises(KeyboardInterrupt):
        checked(request_of(bad=lambda: FakeSystem("run", KeyboardInterrupt())))


def test_another_version_text(request_of):
    found = checked(request_of(good=lambda: FakeSystem(version=threading)))
    assert found["good"].note.startswith("<module 'threading'")

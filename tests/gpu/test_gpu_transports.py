"""Every way from the target's features to a step: the same bits in the slots, the same losses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gpu_runs
import pytest

pytestmark = pytest.mark.gpu

STEPS = 8 if gpu_runs.REHEARSAL else 40
ARGUMENTS = ("--max-steps", STEPS, "--save-interval", STEPS // 2, "--eval-interval", STEPS)
IN_TRANSFORMERS = ("--target.backend", "huggingface")
# The trainer's Python of the README's two environments has no torch; then there is no target in its process.
IN_PROCESS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """(directory, output) of the run that the others are compared with."""
    out = tmp_path_factory.mktemp("transports")
    return out, gpu_runs.train(out, "mapped", *ARGUMENTS).end()


@pytest.fixture(scope="module")
def others(mapped):
    """Runs beside each other that differ from `mapped` in one thing, ended, by name; and two that only read slots."""
    out, _ = mapped
    commands = {
        "loaded": gpu_runs.train(out, "loaded", *ARGUMENTS, "--trainer.no-map-frozen"),
        "shared_memory": gpu_runs.train(out, "shared_memory", *ARGUMENTS, "--bridge.transport", "shared_memory"),
        "verify": gpu_runs.train(out, "verify", *ARGUMENTS, "--bridge.verify"),
        "transformers": gpu_runs.train(out, "transformers", *ARGUMENTS, *IN_TRANSFORMERS),
    }
    if IN_PROCESS:
        inside = (*IN_TRANSFORMERS, "--bridge.transport", "in_process", "--bridge.reader-processes", "0")
        commands["in_process"] = gpu_runs.train(out, "in_process", *ARGUMENTS, *inside)
    for command in commands.values():
        command.communicate()
    return commands


@pytest.fixture(scope="module")
def slots(mapped):
    """What a trainer without torch finds in the slots of each transport."""
    out, _ = mapped
    script = str(Path(__file__).with_name("read_slots.py"))
    options = ["--config", "tiny_qwen35vl.py", *gpu_runs.PRECISION, "--bridge.python", gpu_runs.BRIDGE_PYTHON]
    options += ["--target.backend", gpu_runs.BACKEND]
    if not gpu_runs.REHEARSAL:
        options += ["--trainer.memory-fraction", gpu_runs.TRAINER_FRACTION]
        options += ["--bridge.memory-fraction", gpu_runs.BRIDGE_FRACTION]
    files = {"shared_memory": out / "shared.json", gpu_runs.TRANSPORT: out / "own.json"}
    started = [
        gpu_runs.Command(script, file, *options, "--bridge.transport", transport, out=out)
        for transport, file in files.items()
    ]
    for command in started:
        command.end()
    return {transport: json.loads(file.read_text()) for transport, file in files.items()}


def test_a_slot_is_read_where_it_is_by_a_trainer_without_torch(slots):
    found = slots[gpu_runs.TRANSPORT]
    assert not found["torch"]
    for slot in found["slots"]:
        for name, field in slot.items():
            assert field["in_place"], name
            assert field["platform"] == ("cpu" if gpu_runs.REHEARSAL else "gpu"), name
    assert len(found["slots"]) > len(set(found["addresses"])) >= 2


def test_the_slots_of_both_transports_hold_the_same_bits(slots):
    """Features, tokens, masks. On a GPU those of shared memory are copied there."""
    ours, theirs = (slots[name]["slots"] for name in (gpu_runs.TRANSPORT, "shared_memory"))
    assert len(ours) == len(theirs) >= 5
    assert {slot["features"]["dtype"] for slot in ours} == {"bfloat16"}
    assert len({slot["features"]["digest"] for slot in ours}) == len(ours), "rows differ"
    for a, b in zip(ours, theirs, strict=True):
        assert {name: field["digest"] for name, field in a.items()} == {n: field["digest"] for n, field in b.items()}


def test_the_targets_matrices_are_lent_in_place_and_are_the_files(slots):
    assert "shares no GPU memory" in slots["shared_memory"]["not_lent"]
    found = slots[gpu_runs.TRANSPORT]
    if gpu_runs.REHEARSAL:
        assert "not_lent" in found
        return
    assert found["lent"].keys() == found["of_the_file"].keys()
    for name, matrix in found["lent"].items():
        assert matrix["in_place"], name
        assert matrix["digest"] == found["of_the_file"][name], name


def test_the_run_that_the_others_are_compared_with(mapped):
    out, output = mapped
    gpu_runs.assert_learns(out / "mapped", STEPS)
    assert gpu_runs.REHEARSAL or ": mapped from the bridge" in output, output


@pytest.mark.parametrize("name", ["loaded", "shared_memory", "verify"])
def test_the_same_losses_to_the_last_bit(name, mapped, others):
    out, _ = mapped
    output = others[name].end()
    for split in ("train", "eval"):
        assert gpu_runs.losses(out / name, split) == gpu_runs.losses(out / "mapped", split)
    head = {"loaded": "trainer.map_frozen=False", "shared_memory": "shares no GPU memory"}
    assert gpu_runs.REHEARSAL or head.get(name, ": mapped from the bridge") in output, output


def test_verify_compares_sglang_with_transformers(mapped, others, note):
    out, _ = mapped
    others["verify"].end()
    log = (out / "verify" / "bridge.log").read_text()
    lines = [line for line in log.splitlines() if "bridge.verify: relative error of sglang" in line]
    note("; ".join(lines))
    assert len(lines) == (gpu_runs.BACKEND == "sglang"), log[-3000:]


def test_a_target_in_transformers(mapped, others):
    out, _ = mapped
    others["transformers"].end()
    gpu_runs.assert_learns(out / "transformers", STEPS)


@pytest.mark.skipif(
    not IN_PROCESS, reason="the trainer's Python has no torch and transformers, as the README sets it up"
)
def test_a_target_in_the_trainers_process(mapped, others):
    out, _ = mapped
    others["in_process"].end()
    for split in ("train", "eval"):
        assert gpu_runs.losses(out / "in_process", split) == gpu_runs.losses(out / "transformers", split)

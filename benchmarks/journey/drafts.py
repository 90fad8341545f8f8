"""The stages on the draft that was trained: `evaluate`, `check` and `convert`, each by its own command."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.journey.notes import Notes, StageError, log_of, run, why
from benchmarks.journey.settings import Journey
from jaxdraft.tau_table import bootstrap_ratio

# Shares of the GPU of a trainer's and a bridge's process: two evaluations and a check run side by side, and beside them
# the servers start, which want 15 % of what was free at first to be left.
TRAINER, BRIDGE = 0.12, 0.1


def command(journey: Journey, module: str, *more: str) -> list[str]:
    own = ["--draft", str(journey.draft), "--config", str(journey.run_dir), *more]
    return [sys.executable, "-m", module, *own, *journey.memory(TRAINER, BRIDGE)]


def evaluate(journey: Journey, notes: Notes) -> None:
    """Every held-out set, side by side."""
    names = journey.target.held_out
    with ThreadPoolExecutor() as pool:
        codes = dict(zip(names, pool.map(lambda name: evaluate_set(journey, name), names), strict=True))
    for name, code in codes.items():
        file = journey.out / f"evaluation-{name}.json"
        if not file.is_file():
            notes.fail(f"{name}: jaxdraft.evaluate ended with exit code {code}; {why(journey, f'evaluate-{name}')}")
            continue
        found = json.loads(file.read_text())
        notes.figures[name] = found
        for how, measured in taus(found).items():
            notes.say(f"{name}: tau {how}", measured)
        slots = " ".join(f"{share:.2f}" for share in found["slot_acceptance"])
        notes.say(f"{name}: slots accepted", slots)
        notes.require(bool(found["lossless"]), f"{name}: decoded text", lossless(found))
        notes.require(code == 0, f"{name}: jaxdraft.evaluate", f"exit code {code}")


def evaluate_set(journey: Journey, name: str) -> int:
    output = journey.out / f"evaluation-{name}.json"
    output.unlink(missing_ok=True)
    more = ("--data.eval-path", str(journey.held_out(name)), "--output", str(output))
    # A run of its own name: the logs of bridges lie in its folder.
    more += ("--name", f"evaluate-{name}")
    return run(journey, f"evaluate-{name}", command(journey, "jaxdraft.evaluate", *more))


def taus(found: dict[str, Any]) -> dict[str, str]:
    """Teacher-forced, replayed and decoded, with their 95 % intervals over conversations."""
    whole = next(bucket for bucket in found["tau_table"] if bucket["kind"] == "all")
    forced = number(found["tau_teacher_forced"], whole["low_teacher_forced"], whole["high_teacher_forced"])
    replayed = number(whole["tau"], whole["low"], whole["high"])
    interval = bootstrap_ratio(*np.array(found["decoded"], float).T) if found["num_decoded"] else ()
    decoded = number(found["tau_decoded"], *interval)
    return {
        "teacher-forced": forced,
        "replayed": f"{replayed}, {whole['conversations']} conversations",
        "decoded": f"{decoded}, {found['num_decoded']} conversations",
    }


def number(tau: float | None, low: float | None = None, high: float | None = None) -> str:
    if tau is None:
        return "-"
    return f"{tau:.3f}" + ("" if low is None or high is None else f" ({low:.2f}-{high:.2f})")


def lossless(found: dict[str, Any]) -> str:
    ties = f", {found['near_ties']} of them up to a near tie" if found.get("near_ties") else ""
    return f"token for token the target's own{ties}" if found["lossless"] else "not the target's own"


def check(journey: Journey, notes: Notes) -> None:
    more = ("--name", "check")
    code = run(journey, "check", command(journey, "jaxdraft.check", *more))
    for system, verdict, *cells in table_rows(log_of(journey, "check").read_text(errors="replace")):
        named = zip(("logit error", "same blocks", "near ties", "accept_len"), cells, strict=False)
        notes.say(system, ", ".join([verdict, *(f"{name} {cell}" for name, cell in named if cell != "-")]))
    if code != 0:
        notes.fail(f"jaxdraft.check ended with exit code {code}; {why(journey, 'check')}")


def table_rows(log: str) -> list[list[str]]:
    """The cells of a table that `rich` drew."""
    lines = [line for line in log.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def convert(journey: Journey, notes: Notes) -> None:
    """To speculators' form and back: the same tensors."""
    there, back = journey.out / "converted" / "speculators", journey.out / "converted" / "back"
    for name, source, output, form in (
        ("convert-there", journey.draft, there, "speculators"),
        ("convert-back", there, back, "dflash"),
    ):
        words = [sys.executable, "-m", "jaxdraft.convert", "--draft", source, "--target", journey.model]
        # On a GPU JAX would take most of the memory for it.
        code = run(journey, name, [*words, "--output", output, "--format", form], JAX_PLATFORMS="cpu")
        if code != 0:
            raise StageError(f"jaxdraft.convert to {form} ended with exit code {code}; {why(journey, name)}")
    same, different = compare_tensors(journey.draft, back)
    what = f"{len(same)} equal to the last bit" + (f", not so {', '.join(different[:5])}" if different else "")
    notes.require(bool(same) and not different, "tensors there and back", what)


def compare_tensors(one: Path, other: Path) -> tuple[list[str], list[str]]:
    """Names of tensors that two drafts have with the same bytes, and of all others."""
    found = [read_tensors(one), read_tensors(other)]
    same = [name for name in found[0].keys() & found[1].keys() if found[0][name] == found[1][name]]
    return sorted(same), sorted((found[0].keys() | found[1].keys()) - set(same))


def read_tensors(directory: Path) -> dict[str, tuple[Any, bytes]]:
    """(dtype and shape, bytes) of every tensor, straight from the safetensors files: there is no torch here."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:size]).items():
            if name != "__metadata__":
                first, last = about["data_offsets"]
                tensors[name] = ((about["dtype"], tuple(about["shape"])), data[size + first : size + last])
    return tensors

"""What a journey needs, looked at before anything long starts; and the machine in one line."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks.bridge import versions
from benchmarks.bridge_run import smi
from benchmarks.journey.answers import kit_file, sets_of
from benchmarks.journey.settings import Journey

ASK_PYTHON = """
import importlib.metadata as m, importlib.util as u, json
def version(name):
    if u.find_spec(name) is None:
        return None
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return "without a version"
print(json.dumps({name: version(name) for name in ("sglang", "torch", "transformers")}))
"""
ASKED_S = 60


def check_inputs(journey: Journey) -> None:
    """Raises ValueError: something is missing, in one sentence that says what to do."""
    check_files(journey)
    if journey.servers < 1:
        raise ValueError(f"--servers {journey.servers} is not possible; give 1 or more")
    if journey.quick:
        return
    check_gpu(journey)
    for option, python, stages in (
        ("--bridge-python", journey.bridge_python, {"train", "evaluate", "check", "serve"}),
        ("--server-python", journey.server_python, {"regenerate", "serve"}),
    ):
        if stages & set(journey.stages) and ask_python(option, python)["sglang"] is None:
            raise ValueError(f"{option} {python} has no sglang; give the interpreter of an environment that has it")


def check_files(journey: Journey) -> None:
    for option, files in (("--data", journey.data), ("--held-out", journey.earlier.values())):
        for file in files:
            if not file.is_file():
                raise ValueError(f"{option} {file} is not there; give a .jsonl or .jsonl.gz file of conversations")
    needed: dict[Path, str] = {}  # what is not made by a stage before
    answers = [journey.train_data, *map(journey.held_out, journey.target.held_out)]
    if "regenerate" in journey.stages:
        if journey.kit is not None:
            how = f"`python -m benchmarks.journey.kit {journey.kit} --convert` makes it"
            missing = [name for name in sets_of(journey) if name not in journey.earlier]
            needed |= {kit_file(journey.kit, name): how for name in missing}
    elif "train" in journey.stages:
        needed |= dict.fromkeys(answers, "run the stage regenerate before, or give --data and --held-out")
    if "train" not in journey.stages and {"evaluate", "check", "convert", "serve"} & set(journey.stages):
        needed[journey.draft / "config.json"] = "run the stage train before"
    if journey.kit is not None and journey.stages != ("report",):
        how = f"`python -m benchmarks.journey.kit {journey.kit} --convert` makes it"
        needed[journey.model / "config.json"] = how
    for file, how in needed.items():
        if not file.is_file():
            raise ValueError(f"{file} is not there; {how}")


def check_gpu(journey: Journey) -> None:
    lines = smi("--query-gpu=memory.total,memory.free")
    if not lines:
        raise ValueError("there is no GPU here (nvidia-smi names none); take a machine with one, or give --quick")
    total, free = (int(part) / 1024 for part in lines[0].split(","))
    if sum_of := memory_problem(journey, total, free):
        raise ValueError(sum_of)


def memory_problem(journey: Journey, total: float, free: float) -> str:
    """Why trainer and bridge do not fit, in one sentence; empty: they do. In GiB."""
    shares = journey.trainer_fraction + journey.bridge_fraction
    if free < journey.target.needs_gib:
        return (
            f"the GPU has {free:.0f} GiB free and trainer and bridge need {journey.target.needs_gib:.0f} together; "
            "end what else runs on it (nvidia-smi lists it), or take a larger one"
        )
    if shares * total > free:
        return (
            f"--trainer-fraction {journey.trainer_fraction:g} and --bridge-fraction {journey.bridge_fraction:g} of "
            f"{total:.0f} GiB are {shares * total:.0f} GiB and the GPU has {free:.0f} free; lower one of them, or end "
            "what else runs on it"
        )
    return ""


def ask_python(option: str, python: str) -> dict[str, str | None]:
    """Versions of what an interpreter has. Raises ValueError: it cannot be run."""
    try:
        asked = subprocess.run([python, "-c", ASK_PYTHON], capture_output=True, text=True, timeout=ASKED_S, check=True)
        return json.loads(asked.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ValueError(f"{option} {python} cannot be run ({why}); give a Python interpreter") from error


def describe_machine(journey: Journey) -> str:
    """Date, versions, GPU."""
    gpu = smi("--query-gpu=name,driver_version,memory.total")
    found = ask_python("--bridge-python", journey.bridge_python)
    bridge = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    what = f"target {journey.name}{', quick' if journey.quick else ''}; {', '.join(journey.stages)}"
    return f"{time.strftime('%Y-%m-%d')}, {versions()}; bridge: {bridge}; GPU: {'; '.join(gpu) or 'none'}; {what}"

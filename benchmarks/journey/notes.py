"""What the stages of a journey found: printed when it is measured, and kept in OUT/journey.json."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.journey.settings import REPOSITORY, Journey
from feature_bridge.logs import quote_file

_lock = threading.Lock()  # stages may run side by side
_started: list[subprocess.Popen] = []


class StageError(Exception):
    """A stage cannot go on: one sentence."""


@dataclass(eq=False)
class Notes:
    """One stage's.

    Attributes:
      lines: (what, measured).
      figures: what later stages and the report read.
      faults: what is not as it should be; one ends the journey with exit code 1.
    """

    stage: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failed: bool = False  # before its end

    def say(self, what: str, measured: Any) -> None:
        self.lines.append((what, str(measured)))
        print(f"| {self.stage} | {what} | {measured} |", flush=True)

    def require(self, good: bool, what: str, measured: Any) -> None:
        """A line, and a fault unless it is good."""
        self.say(what, f"{measured}" if good else f"**{measured}**")
        if not good:
            self.faults.append(f"{what}: {measured}")

    def again(self, earlier: dict[str, Any]) -> None:
        """What was found by a call before this one, which is not done anew."""
        for what, measured in earlier["lines"]:
            self.say(what, measured)
        self.faults += earlier["faults"]

    def found(self) -> dict[str, Any]:
        """For `again`."""
        return {"lines": list(self.lines), "faults": list(self.faults)}

    def fail(self, sentence: str) -> None:
        """The stage cannot go on."""
        self.failed = True
        self.require(False, "failed", sentence)


def load(out: Path) -> dict[str, dict[str, Any]]:
    """Everything that OUT/journey.json knows, by stage."""
    file = out / "journey.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def save(out: Path, notes: Notes) -> None:
    """Puts a stage's notes in place of its earlier ones."""
    own = {name: getattr(notes, name) for name in ("lines", "figures", "faults", "seconds")}
    with _lock:
        file, scratch = out / "journey.json", out / "journey.json.tmp"
        scratch.write_text(json.dumps(load(out) | {notes.stage: own}, indent=1))
        os.replace(scratch, file)


@contextlib.contextmanager
def timed(notes: Notes, what: str) -> Iterator[None]:
    """A line with the seconds of a part."""
    began = time.monotonic()
    yield
    notes.say(what, f"{time.monotonic() - began:.0f} s")


# --- programs ---------------------------------------------------------------------------------------------------------


def environment(journey: Journey) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | journey.environment


def start(journey: Journey, name: str, command: Sequence[Any], **env: str) -> subprocess.Popen:
    """A program of its own session, with `env` besides the environment; all it says is in OUT/logs/NAME.log."""
    log = log_of(journey, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(journey) | env,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    _started.append(process)
    return process


def run(journey: Journey, name: str, command: Sequence[Any], **env: str) -> int:
    """Runs a program to its end; its exit code."""
    process = start(journey, name, command, **env)
    try:
        return process.wait()
    finally:
        end_tree(process)


def log_of(journey: Journey, name: str) -> Path:
    return journey.out / "logs" / f"{name}.log"


def why(journey: Journey, name: str) -> str:
    """The clause that quotes a program's log."""
    return quote_file(log_of(journey, name))


def end_all_at(number: signal.Signals) -> None:
    """Lets a signal end this process and all that it started: they have sessions of their own, and would live on."""

    def end(*_: object) -> None:
        for process in _started:
            end_tree(process)
        os._exit(128 + number)

    signal.signal(number, end)


def end_tree(process: subprocess.Popen) -> None:
    """Kills a program and all that it started."""
    import psutil

    if process.poll() is not None:  # its number may be another one's by now
        return
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        found = [root, *root.children(recursive=True)]
    for one in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # another thread may wait for it as well
        process.wait(timeout=10)

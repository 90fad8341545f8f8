"""The stage `serve`: SGLang's HTTP server with the target alone and with the draft, the same prompts, greedy.

Both servers start side by side; while one is measured the other one's processes stand still.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.journey.notes import Notes, StageError, run, why
from benchmarks.journey.serve_compare import compare_texts, speed
from benchmarks.journey.server import Server, servers
from benchmarks.journey.settings import SERVE, Journey, speculative

GOAL = 0.03  # between tau of the server and of the replay


def serve(journey: Journey, notes: Notes, wait: Callable[[], object] = lambda: None) -> None:
    """`wait` returns once nothing else uses the GPU: servers are started before, and measured after that."""
    if journey.quick:
        notes.say("left out", "SGLang has no DFLASH on a CPU: its server ends at `--speculative-algorithm DFLASH`")
        return
    out = journey.out / "serve"
    out.mkdir(exist_ok=True)
    with servers(journey, [("alone", SERVE), ("draft", SERVE | speculative(journey.draft))]) as (alone, draft):
        notes.say("servers up after", f"{alone.wait():.0f} s alone, {draft.wait():.0f} s with the draft")
        wait()
        with draft.stopped():
            ask(journey, alone, out)
        with alone.stopped():
            ask(journey, draft, out, "--block-size", str(block_size(journey.draft)))
        files = ("--alone", str(out / "alone.json"), "--draft", str(out / "draft.json"))
        client(journey, "ties", alone.url, out, *files)
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("alone", "draft", "ties")}
    for level, row in compare(found):
        notes.figures[level] = row
        tokens = f"{row['alone']:,.0f} alone, {row['draft']:,.0f} with the draft"
        notes.say(f"tokens/s, {level} requests at a time", f"{tokens}: x {row['ratio']:.2f}")
        notes.require(not row["texts"].different, f"text, {level} requests at a time", row["texts"])
        row["texts"] = str(row["texts"])
    replay(journey, notes, out)


def ask(journey: Journey, server: Server, out: Path, *more: str) -> None:
    """All rounds of one server. Raises StageError: it failed."""
    client(journey, server.name, server.url, out, *more)


def client(journey: Journey, name: str, url: str, out: Path, *more: str) -> None:
    """`serve_client` in the bridge's Python; OUT/serve/NAME.json."""
    what = "ties" if name == "ties" else "ask"
    command = [journey.bridge_python, "-m", "benchmarks.journey.serve_client", what, str(journey.model)]
    command += [str(journey.held_out(journey.target.held_out[0])), str(out / f"{name}.json"), "--url", url]
    command += ["--number", str(journey.target.served), "--limit", str(journey.target.max_tokens)]
    code = run(journey, f"client-{name}", [*command, "--concurrency", journey.concurrency, *more])
    if code != 0:
        clauses = [why(journey, f"client-{name}"), *(why(journey, f"server-{n}") for n in ("alone", "draft"))]
        raise StageError(f"the client of the server ended with exit code {code}; {'; '.join(clauses)}")


def compare(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each concurrency: tokens/s of both, their ratio, and the texts."""
    rows, ties = found["alone"]["rows"], found["ties"]
    for level, alone in found["alone"]["rounds"].items():
        draft = found["draft"]["rounds"][level]
        texts = compare_texts(rows, alone["answers"], draft["answers"], ties[level])
        yield (
            level,
            {"alone": speed(alone), "draft": speed(draft), "ratio": speed(draft) / speed(alone), "texts": texts},
        )


def replay(journey: Journey, notes: Notes, out: Path) -> None:
    """tau of the server against the replay of the very same answers."""
    command = [sys.executable, "-m", "benchmarks.journey.replay", "--config", str(journey.run_dir)]
    command += ["--draft", str(journey.draft), "--served", str(out / "draft-replay.json")]
    command += ["--data", str(out / "draft.jsonl"), "--bridge-python", journey.bridge_python]
    command += ["--output", str(out / "taus.json")]
    code = run(journey, "replay", [*command, *journey.memory(journey.trainer_fraction, journey.bridge_fraction)])
    if code != 0:
        raise StageError(f"the replay of the served answers ended with exit code {code}; {why(journey, 'replay')}")
    found = json.loads((out / "taus.json").read_text())
    notes.figures["taus"] = found
    low, high = found["interval"]
    whole, early = found["whole"], found["early"]
    notes.say("tau served", f"{whole[0]:.3f} ({low:.2f}-{high:.2f}), whole answers; replayed {whole[1]:.3f}")
    off = early[0] / early[1] - 1
    notes.require(
        abs(off) <= GOAL,
        "tau by SGLang's counts, replay of the same answers",
        f"{early[0]:.3f}, {early[1]:.3f}: {off:+.2%}, of {found['calls'][0]:,} verify calls",
    )
    same = f"{found['same_calls']} with as many verify calls as in the replay"
    notes.say("answers read back token for token", f"{found['read_back']} of {found['served']}, {same}")


def block_size(draft: Path) -> int:
    config = json.loads((draft / "config.json").read_text())
    return config.get("block_size") or config["dflash_config"]["block_size"]

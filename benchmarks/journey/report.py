"""The stage `report`: one table of what all stages left, for RESULTS.md."""

from __future__ import annotations

from typing import Any

from benchmarks.journey.notes import load
from benchmarks.journey.settings import STAGES, Journey


def table(journey: Journey) -> str:
    return table_of(load(journey.out), [stage for stage in STAGES if stage != "report"])


def faults(journey: Journey) -> list[str]:
    return [f"{stage}: {fault}" for stage, one in load(journey.out).items() for fault in one["faults"]]


def table_of(found: dict[str, dict[str, Any]], stages: list[str]) -> str:
    """Every line of every stage in their order; a stage that was not run says so."""
    lines = ["| stage | what | measured |", "|---|---|---|"]
    for stage in stages:
        if stage not in found:
            lines.append(f"| {stage} | not run | |")
            continue
        for i, (what, measured) in enumerate(found[stage]["lines"]):
            lines.append(f"| {'' if i else stage} | {what} | {measured} |")
    seconds = sum(one["seconds"] for one in found.values())
    faults = sum(len(one["faults"]) for one in found.values())
    verdict = "all went well" if not faults else f"**{faults} faults**"
    return "\n".join([*lines, f"| all | {seconds:.0f} s of stages | {verdict} |"])

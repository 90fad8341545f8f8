"""The stage `serve`: SGLang's HTTP server with the target alone and with the draft."""

from __future__ import annotations

from benchmarks.journey.notes import Notes
from benchmarks.journey.settings import Journey


def serve(journey: Journey, notes: Notes) -> None:
    if journey.quick:
        notes.say("left out", "SGLang serves no DFLASH draft on a CPU")
        return

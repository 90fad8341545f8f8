"""What a race found, as Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race.curves import (
    CLOCKS,
    SINCE,
    Run,
    faults,
    margin,
    mean_and_interval,
    mean_curve,
    seconds_to,
    shared_taus,
)
from benchmarks.race.figure import COLOURS, LABELS, Line, figure_svg
from benchmarks.race.settings import TRAINERS, Settings, times_file

RATIOS = 6  # taus at which the times are compared

HOW = """Both trainers: the same target, answers, tokens and loss masks (made once by jaxdraft's bridge code), the same
samples in each optimizer step (one packed row; SpecForge gets its samples as a padded batch), the same initial weights,
learning rate, warm-up, clipping and number of steps. jaxdraft is `python -m jaxdraft.train`, its check of the first
checkpoint left out, as SpecForge has none. SpecForge's own online
path needs an SGLang server with its patch and a Mooncake store, neither of which its wheel brings: so its trainer loop,
training model, sampler and optimizer are fed by a capture with transformers on the same GPU ({capture}), which has no
server to start; attention: {attention}. Anchors a step: {anchors} in jaxdraft, over all positions of the row alike;
{theirs:.0f} on average in SpecForge, where each sample has up to the same number. Clocks count everything between two
steps, keeping drafts included (jaxdraft: whole checkpoints in the background; SpecForge: its weights alone, by a
thread); neither evaluates while it trains. Both sides find tokens and index made. The runs followed each other, nothing
else on the GPU. Every draft was evaluated by one program, exported in bfloat16."""


def read_runs(settings: Settings, out: Path, taus: dict[str, Any], name: str) -> list[Run]:
    """The runs of all seeds, with the taus of one held-out set. Raises ValueError: a run or a tau is missing."""
    runs = []
    for trainer in TRAINERS:
        for seed in settings.seeds:
            if not (file := times_file(out, trainer, seed)).is_file():
                raise ValueError(f"{out} has no run of {trainer} with seed {seed}; give --parts {trainer}")
            keys = {0: f"start-{seed}-0"} | {step: f"{trainer}-{seed}-{step}" for step in settings.marks}
            if missing := [key for key in keys.values() if key not in taus]:
                raise ValueError(f"{out} has no tau of {missing[0]}; give --parts evaluate")
            own = {step: taus[key][name] for step, key in keys.items()}
            times = json.loads(file.read_text())
            runs.append(
                Run(
                    trainer=trainer,
                    seed=seed,
                    started=times["started"],
                    ended=times["ended"],
                    taus={step: found["tau"] for step, found in own.items()},
                    bounds={step: (found["low"], found["high"]) for step, found in own.items()},
                )
            )
    return runs


def of_trainer(runs: Sequence[Run], trainer: str) -> list[Run]:
    return [run for run in runs if run.trainer == trainer]


def points_table(runs: Sequence[Run]) -> str:
    """Every evaluated step of both trainers: times (mean of the seeds), tau of each seed, mean and interval."""
    seeds = [run.seed for run in of_trainer(runs, TRAINERS[0])]
    head = ["step", "trainer", "s from process start", "s from first step", *(f"tau, seed {s}" for s in seeds)]
    rows = [[*head, "mean (95 %)"]]
    for step in sorted(runs[0].taus):
        for trainer in TRAINERS:
            own = of_trainer(runs, trainer)
            times = [f"{np.mean([run.seconds(step, clock) for run in own]):.1f}" for clock in CLOCKS]
            taus = [run.taus[step] for run in own]
            mean, low, high = mean_and_interval(taus, [run.bounds[step] for run in own])
            shown = [f"{tau:.3f}" for tau in taus]
            rows.append([str(step), LABELS[trainer], *times, *shown, f"{mean:.3f} ({low:.3f} - {high:.3f})"])
    return markdown(rows)


def ratios(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Seconds of both trainers to the same taus, on both clocks."""
    found = []
    for clock in CLOCKS:
        curves = {name: mean_curve([run.curve(clock) for run in of_trainer(runs, name)]) for name in TRAINERS}
        for tau in shared_taus(list(curves.values()), RATIOS):
            seconds = {name: seconds_to(points, tau) for name, points in curves.items()}
            ratio = seconds["specforge"] / seconds["jaxdraft"] if seconds["jaxdraft"] else None
            found.append({"clock": clock, "tau": tau, "ratio": ratio, **seconds})
    return found


def ratios_table(found: Sequence[dict[str, Any]]) -> str:
    rows = [["tau", "counted from", "jaxdraft, s", "SpecForge, s", "ratio"]]
    for one in found:
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        rows.append([f"{one['tau']:.3f}", one["clock"], f"{one['jaxdraft']:.1f}", f"{one['specforge']:.1f}", ratio])
    return markdown(rows)


def speed_table(settings: Settings, out: Path) -> str:
    """Each run's start, and how long its steps took."""
    rows = [["run", "s to the end of the first step", "median step, ms", "mean step, ms", "loss of steps 1, last"]]
    for trainer in TRAINERS:
        for seed in settings.seeds:
            times = json.loads(times_file(out, trainer, seed).read_text())
            steps = 1e3 * np.diff(times["ended"])
            losses = f"{times['loss'][0]:.4f}, {times['loss'][-1]:.4f}"
            cells = [f"{LABELS[trainer]}, seed {seed}", f"{times['ended'][0] - times['started']:.1f}"]
            rows.append([*cells, f"{np.median(steps):.1f}", f"{np.mean(steps):.1f}", losses])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(runs: Sequence[Run], name: str, clock: str) -> str:
    lines = {}
    for trainer in TRAINERS:
        curves = [run.curve(clock) for run in of_trainer(runs, trainer)]
        lines[LABELS[trainer]] = Line(mean_curve(curves), curves, COLOURS[trainer])
    return figure_svg(f"replayed tau on {name}, over seconds since {SINCE[clock]}", lines)


def write_report(settings: Settings, out: Path, taus: dict[str, Any]) -> tuple[str, list[str]]:
    """Writes OUT/report.json and the curves; the Markdown, and the faults of the first held-out set."""
    names = [name for name, _ in settings.held_out]
    runs = {name: read_runs(settings, out, taus, name) for name in names}
    first = runs[names[0]]
    theirs = json.loads(times_file(out, "specforge", settings.seeds[0]).read_text())
    how = HOW.format(
        capture=settings.capture,
        attention=settings.attention,
        anchors=settings.num_anchors,
        theirs=np.mean(theirs["anchors"]),
    )
    compared, wrong = ratios(first), faults(first)
    parts = [" ".join(how.split()), theirs["versions"]]
    for name in names:
        parts.append(f"**Replayed tau, {name}** (means may differ by {margin(runs[name]):.3f} by the seeds alone)")
        parts.append(points_table(runs[name]))
    parts += [f"**Seconds to the same tau, {names[0]}**", ratios_table(compared), speed_table(settings, out)]
    if (out / "variants.json").is_file():
        rows = [["SpecForge's attention", "capture", "ms a step", "s to the end of the first step, imports left out"]]
        for one in json.loads((out / "variants.json").read_text()):
            rows.append([one["attention"], one["capture"], f"{one['ms']:.1f}", f"{one['first']:.1f}"])
        parts.append(markdown(rows))
    parts += [f"- {sentence}" for sentence in wrong] or ["The same tau at equal steps, and ahead at every point."]
    points = [
        {"set": name, "trainer": run.trainer, "seed": run.seed, "step": step, "tau": tau, "bounds": run.bounds[step]}
        | {clock: run.seconds(step, clock) for clock in CLOCKS}
        for name in names
        for run in runs[name]
        for step, tau in sorted(run.taus.items())
    ]
    whole = {"how": " ".join(how.split()), "versions": theirs["versions"], "points": points}
    whole |= {"ratios": compared, "faults": wrong, "margin": margin(first)}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    for clock, file in zip(CLOCKS, ("race.svg", "race-training.svg"), strict=True):
        (out / file).write_text(figure(first, names[0], clock))
    return "\n\n".join(parts), wrong

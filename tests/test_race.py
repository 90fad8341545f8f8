"""benchmarks.race: both trainers for real on a tiny target, and the pure parts that say what a race found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.race import __main__ as race
from benchmarks.race.curves import Run, faults, margin, mean_and_interval, mean_curve, seconds_to, shared_taus, tau_at
from benchmarks.race.figure import Line, figure_svg
from benchmarks.race.quick import write_answers, write_target
from benchmarks.race.report import points_table, ratios, ratios_table
from benchmarks.race.samples import anchors_per_sample
from benchmarks.race.settings import marks_of
from benchmarks.race.start import by_sample
from benchmarks.race.tokens import plan_rows
from jaxdraft.optim import OptimConfig, learning_rate

ROOT = Path(__file__).parents[1]
CURVE = [(10.0, 1.0), (20.0, 1.5), (40.0, 1.4), (60.0, 2.0)]


def test_race_quick(tmp_path):
    """Two trainings and their evaluation. Equal weights, tokens and anchors give both trainers the same first loss."""
    command = [sys.executable, "-m", "benchmarks.race", "--quick", "--seeds", "0", "--out", str(tmp_path)]
    options = {"cwd": ROOT, "env": os.environ | {"XLA_FLAGS": ""}, "capture_output": True, "text": True}  # one device
    result = subprocess.run(command, timeout=900, check=False, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (apart,) = re.findall(r"the first step's loss at equal .* \((\S+) apart\)", result.stdout)
    assert float(apart) < 1e-4
    rows = re.findall(r"^\| (\d+) \| (jaxdraft|SpecForge) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", result.stdout, re.M)
    assert [(int(step), trainer) for step, trainer, _ in rows] == [
        (step, trainer) for step in (0, 12, 24, 36, 48) for trainer in ("jaxdraft", "SpecForge")
    ]
    assert max(float(tau) for *_, tau in rows) > 1.01, "neither learnt anything"
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["points"]) == len(rows)
    losses = {name: json.loads((tmp_path / f"times-{name}-0.json").read_text()) for name in ("jaxdraft", "specforge")}
    assert {name: len(found["ended"]) for name, found in losses.items()} == {"jaxdraft": 48, "specforge": 48}
    for found in losses.values():
        assert found["loss"][-1] < 0.8 * found["loss"][0]
        assert np.all(np.diff([found["started"], *found["ended"]]) >= 0)
    assert np.allclose(losses["specforge"]["anchors"], 24, atol=6)
    for name in ("race.svg", "race-training.svg"):
        xml.etree.ElementTree.parse(tmp_path / name)

    # A limit leaves the rest to the next call. Nothing is trained or evaluated twice; other settings are refused.
    again = subprocess.run(command, timeout=300, check=False, **options)
    assert again.returncode == 0
    assert "<!-- jaxdraft-0" not in again.stdout
    assert "jaxdraft-0-12: " not in again.stdout
    with pytest.raises(ValueError, match=r"holds a race of other settings: .*; give another --out"):
        race.main([*command[3:], "--steps", "40"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "T"], "--data is missing; give it, or --quick"),
        (["--parts", "train"], "--parts has 'train'; give some of variants, jaxdraft, specforge, evaluate, report"),
        (["--held-out", "a=gone.jsonl"], "gone.jsonl is not there; give a JSONL file of the target's answers"),
        (["--points", "5"], "--points 5 is not between 6 and --steps 1500; change one of them"),
        ([], "there is no NVIDIA GPU here; run it on a machine with one, or with --quick"),
        (["--quick", "--", "--accumulation", "2"], "accumulation=2 has no counterpart in SpecForge's trainer"),
        (["--quick", "--", "--optim.beta2", "0.95"], r"optim\.beta2=0\.95 has no counterpart in SpecForge's trainer"),
        (
            ["--quick", "--specforge-python", "bare"],
            r"bare cannot import SpecForge \(.*\); install specforge==0.2.0",
        ),
        (["--quick", "--steps", "1000", "--points", "8"], "--steps 1000 is more than the [0-9]+ rows of 2 epochs"),
    ],
)
def test_what_cannot_be(options, message, tmp_path, monkeypatch):
    """One sentence, before anything long starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "num_gpus", lambda: 0)
    bare = tmp_path / "bare"  # without site-packages there is no specforge
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o700)
    options = [str(bare) if option == "bare" else option for option in options]
    whole = []
    if options[:1] not in (["--quick"], ["--target"]):
        train, held_out = write_answers(tmp_path)
        whole = ["--target", str(write_target(tmp_path / "target")), "--data", str(train), "--held-out", str(held_out)]
    with pytest.raises(ValueError, match=message):
        race.main(["--out", str(tmp_path / "out"), *whole, *options])


def test_specforge_has_our_learning_rates():
    """Nearly: its cosine begins with the last step of the warm-up, and is 0.2 % of the peak higher in 40 steps."""
    from specforge.optimizer import BF16Optimizer

    steps, config = 40, OptimConfig(learning_rate=1e-3, warmup_ratio=0.1)
    model = torch.nn.Linear(2, 2)
    optimizer = BF16Optimizer(model, lr=1e-3, max_grad_norm=1.0, total_steps=steps, warmup_ratio=0.1)
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.get_learning_rate())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    ours = [learning_rate(config, steps, jnp.int32(i)) for i in range(steps)]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=0.002 * 1e-3)
    np.testing.assert_allclose(theirs[:4], ours[:4], rtol=1e-6)


# --- pure parts -------------------------------------------------------------------------------------------------------


def test_tau_and_time_by_straight_lines():
    assert [tau_at(CURVE, s) for s in (0, 10, 15, 30, 99)] == pytest.approx([1.0, 1.0, 1.25, 1.45, 2.0])
    assert seconds_to(CURVE, 0.9) == 10
    assert seconds_to(CURVE, 1.25) == 15
    assert seconds_to(CURVE, 1.45) == 19, "the first time, not after the dent"
    assert seconds_to(CURVE, 1.7) == 50
    assert seconds_to(CURVE, 2.01) is None
    assert mean_curve([[(1, 1.0), (3, 2.0)], [(3, 2.0), (5, 4.0)]]) == [(2, 1.5), (4, 3.0)]
    assert shared_taus([CURVE, [(1.0, 1.2), (2.0, 1.8)]], 3) == pytest.approx([1.4, 1.6, 1.8])
    assert shared_taus([CURVE, [(1.0, 2.5), (2.0, 3.0)]], 3) == []


def make_runs(taus: dict[str, list[list[float]]], step_seconds: dict[str, float], start: float = 10.0) -> list[Run]:
    """Runs of 30 steps that were evaluated after 0, 10, 20 and 30; `taus` by trainer and seed."""
    return [
        Run(
            trainer=trainer,
            seed=seed,
            started=100.0,
            ended=[100.0 + start + step_seconds[trainer] * i for i in range(30)],
            taus=dict(zip((0, 10, 20, 30), own, strict=True)),
            bounds=dict.fromkeys((0, 10, 20, 30), (1.0, 1.2)),
        )
        for trainer, seeds in taus.items()
        for seed, own in enumerate(seeds)
    ]


SEEDS = [[1.0, 1.40, 1.60, 1.70], [1.0, 1.41, 1.62, 1.72], [1.0, 1.42, 1.61, 1.71]]


def test_clocks():
    (run,) = make_runs({"jaxdraft": SEEDS[:1]}, {"jaxdraft": 2.0})
    assert run.curve("process") == [(10, 1.0), (28, 1.40), (48, 1.60), (68, 1.70)]
    assert run.curve("first step") == [(0, 1.0), (18, 1.40), (38, 1.60), (58, 1.70)]


def test_faults():
    seconds = {"jaxdraft": 1.0, "specforge": 2.0}
    same = make_runs({"jaxdraft": SEEDS, "specforge": SEEDS}, seconds)
    assert margin(same) == pytest.approx(2.776 * 0.01 * (2 / 3) ** 0.5, rel=1e-3)
    assert faults(same) == []

    worse = make_runs({"jaxdraft": [[t - 0.05 * (t > 1) for t in own] for own in SEEDS], "specforge": SEEDS}, seconds)
    assert faults(worse)[0] == "at step 10 tau is 1.360 and SpecForge's 1.410: more than 0.023 apart"
    assert faults(worse)[-1].startswith("58.0 s after the end of the first step tau is 1.660 and SpecForge's 1.710")

    slower = make_runs({"jaxdraft": SEEDS, "specforge": SEEDS}, {"jaxdraft": 2.0, "specforge": 1.0})
    assert len(faults(slower)) == 6, "behind at each of three points on both clocks"
    single = make_runs({"jaxdraft": SEEDS[:1], "specforge": SEEDS[:1]}, seconds)
    assert margin(single) == pytest.approx(0.1 * 2**0.5), "one seed: by the held-out answers"


def test_tables():
    runs = make_runs({"jaxdraft": SEEDS, "specforge": SEEDS}, {"jaxdraft": 1.0, "specforge": 2.0})
    assert mean_and_interval([1.5], [(1.4, 1.6)]) == (1.5, 1.4, 1.6)
    rows = points_table(runs).splitlines()
    assert len(rows) == 2 + 8
    assert rows[4] == "| 10 | jaxdraft | 19.0 | 9.0 | 1.400 | 1.410 | 1.420 | 1.410 (1.385 - 1.435) |"
    found = ratios(runs)
    assert [one["clock"] for one in found] == 6 * ["process"] + 6 * ["first step"]
    assert all(one["ratio"] == pytest.approx(2) for one in found[6:])
    assert all(1 < one["ratio"] < 2 for one in found[:6])
    assert ratios_table(found).splitlines()[-1] == "| 1.710 | first step | 29.0 | 58.0 | 2.00 |"


def test_figure():
    svg = figure_svg("tau & time", {"a": Line(CURVE, [CURVE, CURVE[:2]], "#123"), "b": Line(CURVE[1:], [], "#456")})
    root = xml.etree.ElementTree.fromstring(svg)
    lines = [x for x in root.iter() if x.tag.endswith("polyline")]
    assert [(x.get("stroke"), x.get("stroke-width")) for x in lines] == [
        ("#123", "0.8"), ("#123", "0.8"), ("#123", "2.2"), ("#456", "2.2")
    ]  # fmt: skip
    places = [tuple(map(float, place.split(","))) for place in lines[2].get("points").split()]
    assert places[-1][1] < places[1][1] < places[0][1], "a higher tau is higher up"
    assert "tau & time" in [x.text for x in root.iter()]


def test_marks_and_anchors():
    assert marks_of(1500, 8) == (188, 376, 564, 752, 940, 1128, 1316, 1500)
    assert marks_of(6, 6) == (1, 2, 3, 4, 5, 6)
    assert anchors_per_sample([100, 100, 4], 60) == 28
    assert anchors_per_sample([3, 2], 60) == 3, "as many as there are"
    np.testing.assert_array_equal(by_sample(np.array([0, 3, 9, 10]), [5, 4, 3]), [[0, 3], [-1, -1], [0, 1]])
    with pytest.raises(ValueError, match="--steps 9 is more than the 2 rows of 2 epochs"):
        plan_rows(np.array([3, 4]), seed=0, epochs=2, row_tokens=8, steps=9)

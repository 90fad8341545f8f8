"""Loss and tau over the steps of a run as an SVG, for the model card. No plotting library: two panels of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from jaxdraft.metrics import read_lines

Points = Sequence[tuple[float, float]]

PANEL_W, PANEL_H, LEFT, TOP, GAP = 300, 190, 46, 34, 70  # pixels
POINTS = 150  # of a curve at most: neighbours are averaged
TRAIN, HELD_OUT, REPLAY = "#6b8fb5", "#1b3a5c", "#c2571a"


def read_metrics(file: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl through a step; none where there is no such file."""
    return [line for line in read_lines(file) if line["step"] <= last_step]


def curves_svg(metrics: Sequence[dict[str, Any]]) -> str:
    """The picture; empty where fewer than two steps were logged."""

    def points(split: str, name: str) -> list[tuple[float, float]]:
        found = [(line["step"], line.get(name)) for line in metrics if line["split"] == split]
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    if len(points("train", "loss")) < 2:
        return ""
    panels = {
        "loss": {"train": (points("train", "loss"), TRAIN), "held out": (points("eval", "loss"), HELD_OUT)},
        "tau, tokens a verify call": {
            "train": (points("train", "tau"), TRAIN),
            "held out": (points("eval", "tau"), HELD_OUT),
            "replayed": (points("eval", "tau_replay"), REPLAY),
        },
    }
    # Where every answer is shorter than a block, no tau is known.
    panels = {title: curves for title, curves in panels.items() if any(found for found, _ in curves.values())}
    width, height = LEFT + 2 * PANEL_W + GAP + 20, TOP + PANEL_H + 40
    drawn = [_panel(title, curves, LEFT + i * (PANEL_W + GAP)) for i, (title, curves) in enumerate(panels.items())]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
        + "".join(drawn)
        + "</svg>\n"
    )


def thinned(points: Points) -> Points:
    """At most POINTS of them: the means of equally long runs."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _panel(title: str, curves: dict[str, tuple[Points, str]], left: float) -> str:
    shown = {name: (thinned(points) if name == "train" else points, c) for name, (points, c) in curves.items()}
    xs, ys = zip(*(point for points, _ in shown.values() for point in points), strict=True)
    bottom, top = min(ys), max(ys)
    top = top if top > bottom else bottom + 1

    def x(step: float) -> float:
        return left + PANEL_W * step / max(xs)

    def y(value: float) -> float:
        return TOP + PANEL_H * (1 - (value - bottom) / (top - bottom))

    parts = [f'<text x="{left}" y="{TOP - 18}" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        value, step = bottom + (top - bottom) * i / 4, max(xs) * i / 4
        parts.append(
            f'<path d="M{left} {y(value):.1f}h{PANEL_W}" stroke="#e3e3e3"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
            f'<text x="{x(step):.1f}" y="{TOP + PANEL_H + 16}" text-anchor="middle">{step:,.0f}</text>'
        )
    for i, (name, (points, colour)) in enumerate(shown.items()):
        if not points:
            continue
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if name != "train":
            parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in points]
        parts.append(f'<text x="{left + 70 * i}" y="{TOP - 5}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{left + PANEL_W / 2}" y="{TOP + PANEL_H + 32}" text-anchor="middle">step</text>')
    return "".join(parts)

"""Tau over wall-clock as an SVG: the mean of the seeds of each trainer as a line, the seeds themselves as thin ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]  # seconds, tau

WIDTH, HEIGHT = 640, 300  # of the panel, pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 44, 20, 44


@dataclass(frozen=True)
class Line:
    """A trainer's curve: the mean over its seeds, and each seed's own."""

    mean: Points
    seeds: Sequence[Points]
    colour: str


COLOURS = {"jaxdraft": "#c2571a", "specforge": "#1b3a5c"}
LABELS = {"jaxdraft": "jaxdraft", "specforge": "SpecForge"}


def figure_svg(title: str, lines: Mapping[str, Line]) -> str:
    """The picture, for `lines` by label. Every line needs a point."""
    everything = [point for line in lines.values() for points in (line.mean, *line.seeds) for point in points]
    last = max(seconds for seconds, _ in everything) or 1.0
    low, high = min(tau for _, tau in everything), max(tau for _, tau in everything)
    high = high if high > low else low + 1

    def x(seconds: float) -> float:
        return LEFT + WIDTH * seconds / last

    def y(tau: float) -> float:
        return TOP + HEIGHT * (1 - (tau - low) / (high - low))

    def polyline(points: Points, colour: str, width: float, opacity: float) -> str:
        places = " ".join(f"{x(s):.1f},{y(tau):.1f}" for s, tau in points)
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        tau, seconds = low + (high - low) * i / 4, last * i / 4
        parts.append(
            f'<path d="M{LEFT} {y(tau):.1f}h{WIDTH}" stroke="#e3e3e3"/>'
            f'<text x="{LEFT - 6}" y="{y(tau) + 4:.1f}" text-anchor="end">{tau:.2f}</text>'
            f'<text x="{x(seconds):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{seconds:,.0f}</text>'
        )
    for i, (label, line) in enumerate(lines.items()):
        parts += [polyline(points, line.colour, 0.8, 0.45) for points in line.seeds]
        parts.append(polyline(line.mean, line.colour, 2.2, 1))
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(tau):.1f}" r="3" fill="{line.colour}"/>' for s, tau in line.mean]
        parts.append(
            f'<text x="{LEFT + 110 * i}" y="{TOP - 8}" fill="{line.colour}" font-weight="bold">{escape(label)}</text>'
        )
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">seconds</text>')
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )

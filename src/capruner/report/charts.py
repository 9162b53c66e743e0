"""Line charts over sparsity as inline SVG: no script, no font, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 46
MARK = 4


@dataclass
class Series:
    """Points ``(x, y)``, ascending; ``label`` writes a value beside each point."""

    name: str
    points: Sequence[tuple[float, float]]
    label: Callable[[float], str] | None = None


def halvings(sparsity: float) -> float:
    """How often the dense weights were halved: 1 at 0.5, 2 at 0.75."""
    return -math.log2(max(1 - sparsity, 2**-14))


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span ``[low, high]``."""
    high = high if high > low else low + 1
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(math.ceil(high / step) - first + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that span ``[low, high]``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**k for k in range(first, max(last, first + 1) + 1)]


def power_of_ten(value: float) -> str:
    """1, 10 and 100 as they are, less as 10⁻³."""
    exponent = round(math.log10(value))
    return (
        f"{value:g}"
        if -2 <= exponent <= 3
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def line_chart(
    identity: str,
    title: str,
    words: str,
    series: Sequence[Series],
    x_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_ticks: Sequence[float],
    *,
    dense: float | None = None,
    logarithmic: bool = False,
    show: Callable[[float], str] = "{:g}".format,
) -> str:
    """One or two series.

    Args:
        identity: unique on the page.
        words: what the picture shows, for those who do not see it.
        x_ticks: place and text, ascending; texts that would cover each other are left out.
        y_ticks: the axis spans them.
        dense: draws a dashed line at this height.
        show: writes a tick.
    """
    frame = _Frame(
        x_ticks[0][0],
        x_ticks[-1][0],
        math.log10 if logarithmic else float,
        (y_ticks[0], y_ticks[-1]),
        TOP + (18 if len(series) > 1 else 0),  # room for a legend
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{identity}-title {identity}-words">',
        f'<title id="{identity}-title">{escape(title)}</title><desc id="{identity}-words">{escape(words)}</desc>',
    ]
    for tick in y_ticks:
        height = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 6, height + 4, show(tick), "end"))
    right = -math.inf
    for place, text in x_ticks:
        half = 3.8 * len(text)
        if frame.x(place) - half > right + 4:
            parts.append(_text(frame.x(place), HEIGHT - BOTTOM + 18, text, "middle"))
            right = frame.x(place) + half
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle"))
    if dense is not None:
        height = frame.y(dense)
        parts.append(f'<line class="dense" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    for one, style in zip(series, ("one", "two")):
        parts += _line(frame, one, style)
    if len(series) > 1:
        for one, style, mark, left in zip(series, ("one", "two"), "●■", (LEFT, (LEFT + WIDTH) // 2)):
            parts.append(f'<text class="{style}" x="{left}" y="{TOP}">{mark} {escape(one.name)}</text>')
    return "".join([*parts, "</svg>"])


@dataclass
class _Frame:
    """From values to places in the picture."""

    first: float
    last: float
    scale: Callable[[float], float]
    span: tuple[float, float]
    top: float

    def x(self, value: float) -> float:
        pad = (self.last - self.first) * 0.1 or 0.5
        return LEFT + (value - self.first + pad) / (self.last - self.first + 2 * pad) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = map(self.scale, self.span)
        return self.top + (high - self.scale(value)) / (high - low) * (HEIGHT - self.top - BOTTOM)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(frame: _Frame, series: Series, style: str) -> list[str]:
    """A line with a mark at each point, and labels that do not cover each other."""
    places = [(frame.x(a), frame.y(b)) for a, b in series.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts = [f'<polyline class="{style}" points="{path}" fill="none" stroke-width="2"/>']
    labelled = -math.inf
    for (a, b), (_, value) in zip(places, series.points):
        if style == "one":
            parts.append(f'<circle class="one" cx="{a:.1f}" cy="{b:.1f}" r="{MARK}"/>')
        else:
            size = 2 * MARK
            parts.append(f'<rect class="two" x="{a - MARK:.1f}" y="{b - MARK:.1f}" width="{size}" height="{size}"/>')
        if series.label and a > labelled + 34:
            labelled = a
            below = b + 18 if b + 18 < HEIGHT - BOTTOM - 2 else b - 9
            label = escape(series.label(value))
            parts.append(f'<text x="{a + 3:.1f}" y="{below:.1f}" text-anchor="end">{label}</text>')
    return parts

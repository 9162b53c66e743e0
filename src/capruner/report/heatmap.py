"""Sparsity by layer and depth as tables whose cells are shaded: a picture for the eye, numbers for everybody."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from capruner.report.charts import halvings
from capruner.report.contents import Measurement
from capruner.report.document import breakable, scrolling

_ALONE = "single layer"
_HEAT = ' class="heat"'
DARKEST = 7.0  # halvings that the shades tell apart: up to 99.2 %


def place(name: str) -> tuple[str, str]:
    """Where a parameter stands and what it is: ``blocks.3.attn.qkv.weight`` is ``attn.qkv`` in ``blocks.3``; ``("", name)`` for one without a depth."""
    parts = name.removesuffix(".weight").split(".")
    cut = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1) + 1
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def shown(share: float) -> str:
    """A share in percent, two digits, three where they matter; 100 only where nothing is left."""
    value = 100 * share
    return f"{value:.0f}" if value < 98 or value == 100 else f"{math.floor(10 * value) / 10:.1f}"


def cell(share: float | None) -> str:
    """A shaded cell; logarithmic in the weights that stay."""
    if share is None:
        return '<td class="none" aria-label="no such layer">·</td>'
    shade = min(halvings(share) / DARKEST, 1.0)
    # Where black and white are equally legible.
    ink = ' class="high"' if shade >= 0.76 else ' class="mid"' if shade >= 0.53 else ""
    return f'<td{ink} style="--s:{shade:.2f}">{shown(share)}</td>'


def depth_table(level: Measurement) -> str:
    """Rows are places in the network, from the input on; columns kinds of layers."""
    places = {row["name"]: place(row["name"]) for row in level.layers}
    often = Counter(kind for depth, kind in places.values() if depth)
    grid: dict[str, dict[str, float]] = {}
    for row in level.layers:
        depth, kind = places[row["name"]]
        if often[kind] < 2 or not depth:  # a stem, a head: a line of its own
            depth, kind = row["name"].removesuffix(".weight"), _ALONE
        grid.setdefault(depth, {})[kind] = row["sparsity"]
    kinds = sorted({kind: None for line in grid.values() for kind in line}, key=lambda kind: kind == _ALONE)
    head = "".join(f'<th scope="col">{breakable(kind)}</th>' for kind in kinds)
    body = "".join(
        f'<tr><th scope="row">{escape(depth)}</th>{"".join(cell(line.get(kind)) for kind in kinds)}</tr>'
        for depth, line in grid.items()
    )
    caption = f"Weights removed at {level.name}, in % of each layer"
    return scrolling(caption, f'<th scope="col">depth</th>{head}', body, _HEAT)


def layer_table(levels: Sequence[Measurement]) -> str:
    """Rows are layers, columns levels."""
    by_name: list[Mapping[str, Any]] = [{row["name"]: row["sparsity"] for row in level.layers} for level in levels]
    head = "".join(f'<th scope="col">{escape(level.name)}</th>' for level in levels)
    body = "".join(
        f'<tr><th scope="row">{breakable(row["name"].removesuffix(".weight"))}</th>{"".join(cell(rows.get(row["name"])) for rows in by_name)}'
        f"<td class=none>{row['numel']:,}</td></tr>"
        for row in levels[0].layers
    )
    head = f'<th scope="col">layer</th>{head}<th scope="col">weights</th>'
    return scrolling("Weights removed from each layer, in %", head, body, _HEAT)


def in_words(level: Measurement) -> str:
    """The map of one level in a sentence."""
    ranked = sorted(level.layers, key=lambda row: row["sparsity"])
    low, high = ranked[0], ranked[-1]
    if low["sparsity"] == high["sparsity"]:
        return f"At {level.name} every layer loses the same share, {shown(low['sparsity'])} %."
    ends = [
        f"{row['name'].removesuffix('.weight')} the {most} ({shown(row['sparsity'])} %)"
        for row, most in ((low, "least"), (high, "most"))
    ]
    third = max(1, len(level.layers) // 3)
    means = []
    for rows in (level.layers[:third], level.layers[-third:]):
        means.append(shown(sum(row["zeros"] for row in rows) / sum(row["numel"] for row in rows)))
    return f"At {level.name}, {ends[0]} and {ends[1]} is removed; {means[0]} % of the weights in the first third of the layers, {means[1]} % in the last third."

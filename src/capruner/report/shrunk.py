"""The page about a model that was shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from capruner.report.contents import RANDOM_WEIGHTS
from capruner.report.document import bar, breakable, document, facts, given, key_figures, number, table


def shrunk_page(summary: Mapping[str, Any]) -> str:
    """The whole document, from what ``capruner shrink`` writes as JSON: ``arguments, top1, costs, units, left_alone``."""
    model, top1 = summary["arguments"]["model"], dict(summary["top1"])
    dense = top1.pop("dense")
    figures = [(f"top-1 accuracy, {what}", f"{value:.2f} %") for what, value in top1.items()]
    left = {what: f"{100 * now / before:.1f} %" for what, (before, now) in summary["costs"].items()}
    figures += [(f"{_COSTS[what][0]} left", share) for what, share in left.items()]
    best = max(top1.values())
    words = f"Top-1 accuracy is {dense:.2f} % dense and {best:.2f} % with {left['macs']} of the multiply-adds."
    notes = [RANDOM_WEIGHTS] if summary["arguments"].get("random_weights") else []
    sections = {
        "Accuracy": table(
            "Top-1 accuracy", ["model", "top-1 %"], [[escape(w), number(v)] for w, v in summary["top1"].items()]
        ),
        "What is left": _costs(summary["costs"]),
        "Units by layer": _units(summary["units"]),
        "Left alone": _left_alone(summary["left_alone"]),
        "What was run": facts("Arguments", given(summary["arguments"])),
    }
    return document(f"{model}, shrunk", words, key_figures(figures), notes, sections)


_COSTS = {
    "macs": ("multiply-adds", lambda value: f"{value:,.0f}"),
    "parameters": ("parameters", lambda value: f"{value:,.0f}"),
    "seconds": ("time of a call", lambda value: f"{1000 * value:.2f} ms"),
}


def _costs(costs: Mapping[str, Any]) -> str:
    rows = []
    for what, (dense, now) in costs.items():
        name, form = _COSTS[what]
        rows.append([name, form(dense), form(now), f"{100 * now / dense:.1f}"])
    text = (
        "<p>The model is dense and has smaller layers, so every runtime has less to do. How much faster that is depends on the machine: "
        "<code>capruner bench</code>.</p>"
    )
    return text + table("Costs of one input", ["", "dense", "now", "% left"], rows)


def _units(rows: list[Mapping[str, Any]]) -> str:
    cells = [
        [
            breakable(row["name"]),
            f'<td class="text">{escape(row["kind"])}</td>',
            f"{row['units']:,}",
            f"{row['left']:,}",
            bar(row["left"] / row["units"], f"{row['left'] / row['units']:.0%} left"),
        ]
        for row in rows
    ]
    return table(
        "Units that are left, from the input to the output", ["units of", "kind", "dense", "now", "left"], cells
    )


def _left_alone(items: list[Mapping[str, str]]) -> str:
    rows = [[breakable(item["name"]), f'<td class="text">{escape(item["reason"])}</td>'] for item in items]
    return table("Modules whose units all remain", ["module", "why"], rows) if rows else ""

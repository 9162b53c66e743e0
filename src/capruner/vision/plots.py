"""The two plots of an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from capruner.report.charts import halvings
from capruner.report.heatmap import shown

# Okabe and Ito's colours, which people with colour blindness can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"
DARKEST = 9.0  # halvings of a layer's weights that the heat map tells apart: up to 99.8 %
Layers = Mapping[float, Sequence[Mapping[str, Any]]]
"""``{overall sparsity: rows with name and sparsity, in the model's order}``."""


def accuracy_vs_sparsity(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, title: str
) -> None:
    """Plot top-1 accuracy against sparsity: a labelled curve per method, and a line for the dense model.

    The axis is logarithmic in the weights that remain: 50 to 75 % is as far as 98 to 99 %, a halving.

    Args:
        curves: method to ``(sparsity in [0, 1), top-1 in %)`` points, at least one each.
        dense: top-1 of the dense model in %.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2))
    points = sorted({s for curve in curves.values() for s, _ in curve})
    axes.axhline(dense, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    ends: dict[str, float] = {}
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS):
        xs, ys = zip(*[(halvings(s), top1) for s, top1 in sorted(curve)])
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2, markersize=6, clip_on=False, zorder=3)
        ends[name] = ys[-1]
        if len(curves) == 1:
            for x, y in zip(xs, ys):
                axes.annotate(f"{y:.1f}", (x, y), (2, -14), textcoords="offset points", ha="right", fontsize=8.5)
    for (name, height), colour in zip(_apart(ends | {f"dense {dense:.1f}": dense}).items(), (*COLOURS, GREY)):
        own = GREY if name not in ends else colour
        axes.annotate(
            name,
            (1, height),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=own,
            va="center",
            fontweight="bold" if name in ends else "normal",
            annotation_clip=False,
        )
    axes.set_xticks([halvings(s) for s in points], [f"{100 * s:g}" for s in points])
    axes.set_ylim(0, 103)
    axes.set_xlabel("weights removed (% of the prunable ones), logarithmic in what remains")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11, pad=12)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    _save(figure, path)


def layer_sparsity(path: Path, methods: Mapping[str, Layers], title: str) -> None:
    """Plot a heat map per method of the sparsity of each layer (rows) at each overall sparsity (columns), logarithmic in what remains."""
    first = next(iter(methods.values()))
    names = [row["name"] for row in next(iter(first.values()))]
    columns = max(len(layers) for layers in methods.values())
    size = (1.9 + (0.55 * columns + 0.35) * len(methods), 1.0 + 0.23 * len(names))
    figure, panels = plt.subplots(1, len(methods), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (method, layers) in zip(panels[0], methods.items()):
        grid = [[row["sparsity"] for row in rows] for rows in zip(*layers.values())]
        shades = [[min(halvings(share), DARKEST) for share in line] for line in grid]
        axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=DARKEST)
        for i, line in enumerate(grid):
            for j, share in enumerate(line):
                ink = "white" if shades[i][j] > 0.55 * DARKEST else "black"
                axes.text(j, i, shown(share), ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(layers)), [f"{100 * s:g}" for s in layers])
        axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(methods) > 1:
            axes.set_title(method, fontsize=10, fontweight="bold")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supxlabel("weights removed overall (%)", fontsize=10)
    _save(figure, path)


def _apart(heights: Mapping[str, float], gap: float = 5.0) -> dict[str, float]:
    """Label heights moved up where labels would overlap, in the order of ``heights``."""
    moved: dict[str, float] = {}
    floor = -math.inf
    for name in sorted(heights, key=heights.__getitem__):
        moved[name] = floor = max(heights[name], floor + gap)
    return {name: moved[name] for name in heights}


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)

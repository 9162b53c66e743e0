"""The two pictures of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours: told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def accuracy_vs_sparsity(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, title: str
) -> None:
    """Top-1 over sparsity, a labelled curve per method and a line for the dense model.

    Args:
        curves: method to ``(sparsity in [0, 1], top-1 in %)`` points.
        dense: top-1 of the dense model in %.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    points = sorted({s for curve in curves.values() for s, _ in curve})
    places = {s: i for i, s in enumerate(points)}  # even spacing: what matters happens between 90 and 100 %
    axes.axhline(dense, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"dense {dense:.1f} %", (0, dense), xytext=(0, 4), textcoords="offset points", color="#555555", fontsize=9
    )
    ends: list[float] = []
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS):
        xs, ys = zip(*[(places[s], y) for s, y in sorted(curve)])
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2, markersize=6, clip_on=False)
        height = ys[-1]
        while any(abs(height - other) < 5 for other in ends):  # labels at the right end must not cover each other
            height += 1
        ends.append(height)
        axes.annotate(
            name,
            (xs[-1], height),
            xytext=(10, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
        )
    axes.set_xticks(range(len(points)), [f"{100 * s:g}" for s in points])
    axes.set_ylim(0, 105)
    axes.set_xlabel("weights removed (% of the prunable ones)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def layer_sparsity(path: Path, layers: Mapping[float, Sequence[dict[str, Any]]], title: str) -> None:
    """A heat map of the sparsity of each layer (rows) at each overall sparsity (columns)."""
    names = [row["name"] for row in next(iter(layers.values()))]
    values = [[100 * row["sparsity"] for row in rows] for rows in layers.values()]
    figure, axes = plt.subplots(figsize=(2.6 + 0.8 * len(layers), 1.2 + 0.24 * len(names)))
    grid = [list(column) for column in zip(*values)]
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            axes.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="black" if value > 55 else "white"
            )
    axes.set_xticks(range(len(layers)), [f"{100 * s:g} %" for s in layers])
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=7)
    axes.set_xlabel("overall")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, label="weights removed (%)", fraction=0.05)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)

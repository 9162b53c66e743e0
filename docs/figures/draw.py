#!/usr/bin/env python
"""Draw the figures of docs/method.md: python docs/figures/draw.py

Everything in them is computed by capruner itself, from a fixed seed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import capruner

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe and Ito's colours


def fisher_block(size: int, seed: int) -> torch.Tensor:
    """A Fisher matrix of correlated gradients, ``(1, size, size)``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + 0.6 * torch.eye(size)
    gradients = torch.randn(4 * size, size, generator=generator) @ mixing
    return (gradients.T @ gradients / len(gradients) + 0.01 * torch.eye(size))[None]


def obs() -> None:
    """Two correlated weights: what removing one costs, alone and with the other re-fitted."""
    fisher = torch.tensor([[[1.0, 0.8], [0.8, 1.0]]])
    weight = torch.tensor([[0.7, 1.0]])
    keep = torch.tensor([[False, True]])
    refitted = capruner.compensate(weight, torch.linalg.inv(fisher), keep)[0]
    axis = np.linspace(-0.6, 2.1, 200)
    x, y = np.meshgrid(axis, axis)
    delta = np.stack([x - 0.7, y - 1.0])
    loss = 0.5 * np.einsum("iab,ij,jab->ab", delta, fisher[0].numpy(), delta)
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    axes.contour(x, y, loss, levels=[0.02, 0.06, 0.12, 0.22, 0.36, 0.6, 1], colors=GREY, linewidths=0.8)
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.plot(0.7, 1.0, "o", color="black")
    axes.annotate("trained weights", (0.7, 1.0), (8, 4), textcoords="offset points")
    for point, colour, label in (
        ((0.0, 1.0), ORANGE, "set to zero"),
        ((0.0, float(refitted[1])), BLUE, "set to zero, the other\nweight re-fitted"),
    ):
        step = np.array(point) - np.array([0.7, 1.0])
        cost = 0.5 * step @ fisher[0].numpy() @ step
        axes.annotate("", point, (0.7, 1.0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.8})
        axes.annotate(
            f"{label}\nloss +{cost:.3f}",
            point,
            (-8, 0),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set(xlim=(-1.3, 2), ylim=(-0.2, 2.2), xlabel="weight 1 (pruned)", ylabel="weight 2 (remains)", aspect="equal")
    save(figure, "obs")


def blocks() -> None:
    """A weight matrix cut along its rows, and the Fisher matrix that remains."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
    colours = plt.get_cmap("Blues")(np.linspace(0.25, 0.85, 8))
    for index in range(8):
        row, half = divmod(index, 2)
        for column in range(3):
            left.add_patch(Rectangle((3 * half + column, 3 - row), 1, 1, facecolor=colours[index], edgecolor="white"))
        right.add_patch(Rectangle((3 * index, 21 - 3 * index), 3, 3, facecolor=colours[index], edgecolor="white"))
    left.set(xlim=(0, 6), ylim=(0, 4), aspect="equal", title="weights of a layer, 4 × 6\n(a row is one neuron)")
    right.add_patch(Rectangle((0, 0), 24, 24, fill=False, edgecolor=GREY))
    right.set(xlim=(-0.2, 24.2), ylim=(-0.2, 24.2), aspect="equal", title="Fisher matrix, 24 × 24\n(8 blocks of B = 3)")
    for axes in (left, right):
        axes.axis("off")
    save(figure, "blocks")


def cholesky() -> None:
    """The factor that elimination writes, row by row, and the entries that it reads."""
    size, steps = 24, 10
    fisher_inv = torch.linalg.inv(fisher_block(size, 0))
    order = capruner.eliminate(torch.randn(1, size, generator=torch.Generator().manual_seed(1)), fisher_inv).order[0]
    shown = order.long()
    permuted = fisher_inv[0][shown][:, shown]
    factor = torch.linalg.cholesky(permuted)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6))
    read = np.full((size, size), 0.08)
    read[shown[:steps].numpy()] = 0.55
    left.imshow(read, cmap="Blues", vmin=0, vmax=1)
    left.set_title(f"inverse block H: only the rows of\nthe {steps} pruned weights are read")
    written = np.tril(np.log10(factor.abs().numpy() + 1e-3))
    written[:, steps:] = np.nan
    written[np.triu_indices(size, 1)] = np.nan
    right.imshow(written, cmap="Blues")
    right.set_title(f"factor L after {steps} steps\n(weights in order of elimination)")
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    save(figure, "cholesky")


def allocation() -> None:
    """Losses of the steps of a few blocks, and the threshold that decides how far each goes."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    size, target = 24, 48
    scores = []
    for index, scale in enumerate((0.3, 0.7, 1.5)):
        generator = torch.Generator().manual_seed(10 + index)
        weight = scale * torch.randn(1, size, generator=generator)
        losses = capruner.eliminate(weight, torch.linalg.inv(fisher_block(size, index))).losses[0]
        scores.append(losses.cummax(dim=0).values)
    threshold = float(torch.cat(scores).sort().values[target - 1])
    for score, colour, name in zip(scores, (BLUE, ORANGE, GREEN), "ABC", strict=True):
        count = int((score <= threshold).sum())
        label = f"block {name}: {count} of {size} pruned"
        axes.semilogy(range(1, size + 1), score, color=colour, drawstyle="steps-mid", label=label)
        axes.plot(count, score[count - 1], "o", color=colour)
    axes.axhline(threshold, color="black", linewidth=0.8, linestyle="--")
    axes.annotate("threshold", (1, threshold), (0, 4), textcoords="offset points")
    axes.set(xlabel="steps of the block's elimination", ylabel="marginal loss")
    axes.legend(frameon=False)
    save(figure, "allocation")


def compensation() -> None:
    """Predicted loss against sparsity: magnitude, OBS masks without and with re-fit."""
    size = 96
    fisher = fisher_block(size, 5)
    fisher_inv = torch.linalg.inv(fisher)
    weight = torch.randn(1, size, generator=torch.Generator().manual_seed(6))
    order = capruner.eliminate(weight, fisher_inv).order[0].long()
    curves: dict[str, list[float]] = {"magnitude": [], "CAP's mask, no re-fit": [], "CAP's mask, re-fitted": []}
    counts = range(4, 92, 4)
    for count in counts:
        keep = torch.ones(1, size, dtype=torch.bool)
        keep[0, order[:count]] = False
        smallest = torch.ones(1, size, dtype=torch.bool)
        smallest[0, weight[0].abs().argsort()[:count]] = False
        candidates = (weight * smallest, weight * keep, capruner.compensate(weight, fisher_inv, keep))
        for losses, pruned in zip(curves.values(), candidates, strict=True):
            step = (pruned - weight)[0]
            losses.append(float(0.5 * step @ fisher[0] @ step))
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for (name, losses), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=True):
        axes.semilogy([100 * count / size for count in counts], losses, color=colour, label=name, linewidth=2)
    axes.set(xlabel="weights of the block removed (%)", ylabel="increase of the quadratic loss")
    axes.legend(frameon=False)
    save(figure, "compensation")


def save(figure: plt.Figure, name: str) -> None:
    for axes in figure.axes:
        _plain(axes)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "capruner", "font.size": 9.5, "savefig.facecolor": "white"})
    for draw in (obs, blocks, cholesky, allocation, compensation):
        draw()


if __name__ == "__main__":
    main()

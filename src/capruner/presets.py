"""The weights of a network's blocks: everything prunable but its stem and its head, which published recipes leave dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

BLOCKS = "__BLOCKS__"
"""The entry of ``params`` for these weights."""
SMALL = 0.05
"""A module around the first convolution, or around the classifier, belongs to the stem or head if it holds at most this share of the prunable weights."""


def stem_and_head(model: nn.Module, names: Sequence[str], sizes: dict[str, int]) -> set[str]:
    """Those of ``names`` that belong to the stem or the head of ``model``.

    timm's models say which their first convolutions and their classifiers are. In others these are the first and the last of ``names``.

    Args:
        names: prunable weights, in the model's order.
        sizes: number of weights of each.
    """
    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    firsts = _layers(said.get("first_conv"), names) or [_layer(names[0])]
    heads = _layers(said.get("classifier"), names) or [_layer(names[-1])]
    total = sum(sizes[name] for name in names)
    found: set[str] = set()
    for layer in (*firsts, *heads):
        inside = _inside(layer, names)
        for around in _around(model, layer):
            wider = _inside(around, names)
            if sum(sizes[name] for name in wider) > SMALL * total:
                break
            inside = wider
        found |= set(inside)
    return found


def _layers(said: Any, names: Collection[str]) -> list[str]:
    """Layers that a configuration names, as far as they have prunable weights."""
    listed: Iterable[Any] = (said,) if isinstance(said, str) else said or ()
    return [layer for layer in listed if isinstance(layer, str) and _inside(layer, names)]


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _inside(module: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == module or name.startswith(f"{module}.")]


def _around(model: nn.Module, layer: str) -> Iterable[str]:
    """The modules around a layer, from the inside; not beyond a list of modules, whose entries are alike."""
    parts = layer.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:depth])
        if parts[depth - 1].isdigit() or isinstance(model.get_submodule(module), nn.ModuleList):
            return
        yield module

"""Removing rows and columns from the layers of a model, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from capruner.batches import call_model
from capruner.models.modes import eval_mode
from capruner.shrinking.units import HEAD_COUNTS, HEAD_WIDTHS, Group, Side, channels


@dataclass(frozen=True)
class Removal:
    """What is removed from a dense model; all that is needed to do the same to another instance of its architecture.

    Attributes:
        layers: ``{layer: {"out" or "in": channels to remove, ascending}}``.
        heads: ``{attention module: heads that remain}``.
        sizes: ``{layer: (output channels, input channels)}`` of the dense model.
    """

    layers: dict[str, dict[Side, list[int]]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, groups: Iterable[Group], removed: Mapping[str, Tensor]) -> Removal:
        """The removal of some units of a dense model; ``removed``: unit numbers by name of the group."""
        found = cls()
        for group in groups:
            gone = removed[group.name].cpu()
            if not len(gone):
                continue
            for cut in group.cuts:
                sides = found.layers.setdefault(cut.layer, {})
                sides[cut.side] = sorted({*sides.get(cut.side, []), *cut.positions[gone].flatten().tolist()})
                layer = model.get_submodule(cut.layer)
                found.sizes[cut.layer] = (channels(layer, "out"), channels(layer, "in"))
            if group.attention:
                found.heads[group.attention] = group.units - len(gone)
        return found

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless ``model`` has the layers of the dense model that this was made for."""
        modules = dict(model.named_modules())
        for name, size in self.sizes.items():
            if name not in modules:
                raise ValueError(
                    f"the model has no layer {name}: build the architecture that was shrunk, before it was"
                )
            now = (channels(modules[name], "out"), channels(modules[name], "in"))
            if now != tuple(size):
                raise ValueError(
                    f"{name} has {now[0]} outputs and {now[1]} inputs, and had {size[0]} and {size[1]} in the model that was shrunk: build "
                    "the dense architecture"
                )

    def apply(self, model: nn.Module) -> None:
        """Remove the rows and columns from ``model``, in place."""
        for name, sides in self.layers.items():
            _cut(model.get_submodule(name), {side: torch.tensor(gone) for side, gone in sides.items()})
        for name, count in self.heads.items():
            _set_heads(model.get_submodule(name), count)

    @torch.no_grad()
    def zero(self, model: nn.Module) -> None:
        """Set to zero what :meth:`apply` removes: the masked twin, whose outputs are those of the shrunk model."""
        for name, sides in self.layers.items():
            layer: Any = model.get_submodule(name)
            if "in" in sides and not _depthwise(layer):
                layer.weight[:, sides["in"]] = 0
            if "out" in sides:
                for tensor in (layer.weight, layer.bias):
                    if tensor is not None:
                        tensor[sides["out"]] = 0


def compare(twin: nn.Module, small: nn.Module, inputs: Any) -> None:
    """Raise ``RuntimeError`` if the outputs of a shrunk model and its masked twin differ by more than rounding."""
    with eval_mode(twin), eval_mode(small), torch.no_grad():
        expected, outputs = (
            [t for t in tree_leaves(call_model(m, inputs)) if isinstance(t, Tensor)] for m in (twin, small)
        )
    for a, b in zip(expected, outputs, strict=True):
        tolerance = min(1000 * torch.finfo(a.dtype).eps, 0.1) * float(a.abs().max()) if a.is_floating_point() else 0
        if a.shape != b.shape or not float((a - b).abs().max()) <= tolerance:
            raise RuntimeError(
                "the smaller model does not compute what the dense one computes with the removed units at zero"
            )


def why_not(model: nn.Module, group: Group, inputs: Any) -> str | None:
    """Why units of a group cannot be removed; None: without the first one the model runs, and computes what its masked twin computes."""
    twin = copy.deepcopy(model)
    removal = Removal.of(model, [group], {group.name: torch.tensor([0])})
    removal.zero(twin)
    small = copy.deepcopy(twin)
    removal.apply(small)
    try:
        compare(twin, small, inputs)
    except Exception as error:  # whatever the model's own code raises
        return f"without one of them, {' '.join(str(error).split())}"
    return None


def _set_heads(module: Any, count: int) -> None:
    """Write the number of heads, and their size together, where an attention keeps them."""
    before = next(getattr(module, key) for key in HEAD_COUNTS if hasattr(module, key))
    for key in (*HEAD_COUNTS, *HEAD_WIDTHS):
        if hasattr(module, key):
            setattr(module, key, getattr(module, key) // before * count)


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1


def _kept(count: int, gone: Tensor) -> Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[gone] = False
    return keep.nonzero()[:, 0]


@torch.no_grad()
def _cut(layer: Any, gone: Mapping[Side, Tensor]) -> None:
    """Remove channels of one layer."""
    if "out" in gone:
        keep = _kept(channels(layer, "out"), gone["out"])
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(layer, name, 0, keep)
        if isinstance(layer, _BatchNorm):
            layer.num_features = len(keep)
        elif isinstance(layer, nn.Linear):
            layer.out_features = len(keep)
        else:
            layer.out_channels = len(keep)
            if _depthwise(layer):
                layer.in_channels = layer.groups = len(keep)
    if "in" in gone:
        keep = _kept(channels(layer, "in"), gone["in"])
        _select(layer, "weight", 1, keep)
        if isinstance(layer, nn.Linear):
            layer.in_features = len(keep)
        else:
            layer.in_channels = len(keep)


def _select(layer: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    """Keep some slices of a parameter or buffer; where the layer has none of that name, nothing."""
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    smaller = tensor.detach().index_select(dim, keep.to(tensor.device)).contiguous()
    if name in layer._buffers:
        layer._buffers[name] = smaller
    else:
        layer._parameters[name] = nn.Parameter(smaller, requires_grad=tensor.requires_grad)

"""Channels of convolutions. Which layers a channel runs through (residual connections, depthwise layers, concatenations) is torch-pruning's knowledge."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from capruner.shrinking.units import Cut, Group, LeftAlone, Side, own_weights


def channel_groups(model: nn.Module, inputs: Any) -> tuple[list[Group], list[LeftAlone]]:
    """The channels of every convolution whose units another layer reads; and the convolutions that are left alone.

    Args:
        inputs: what the model is called with: a tensor, or a tuple or dict of tensors.

    Raises:
        ModuleNotFoundError: the model has several convolutions, and torch-pruning is not installed.
    """
    convolutions = [name for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    if len(convolutions) < 2:  # the patch embedding of a transformer, which the residual stream reads
        return [], []
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "removing channels needs the package torch-pruning, which finds the layers that a channel runs through: pip install 'capruner[shrink]', or "
            'leave "channels" out of `units`',
            name=error.name,
        ) from error
    traced = copy.deepcopy(model).requires_grad_()
    names = {module: name for name, module in traced.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(traced, example_inputs=inputs)
    groups, left = [], []
    for found in graph.get_all_groups(root_module_types=(_ConvNd,)):
        name = names[found[0].dep.target.module]
        group = _group(graph, names, name, found)
        if isinstance(group, str):
            left.append(LeftAlone(name, group))
        elif reason := own_weights(model, [cut.layer for cut in group.cuts]):
            left.append(LeftAlone(name, reason))
        else:
            groups.append(group)
    return groups, left


def _group(graph: Any, names: dict[nn.Module, str], name: str, found: Iterable[Any]) -> Group | str:
    """A group of torch-pruning as ours, or why it is none."""
    cuts: dict[tuple[str, Side], torch.Tensor] = {}
    units = len(found[0].idxs)  # type: ignore[index]
    for item in found:
        module = item.dep.target.module
        if module not in names:  # an operation without weights, or a parameter of its own
            if isinstance(module, nn.Parameter):
                return "its channels are added to, or multiplied with, a parameter that is not in a layer"
            continue
        if not list(module.parameters(recurse=False)) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if isinstance(module, _ConvNd) and module.groups > 1:
            side = "out"  # depthwise: its inputs are its outputs
        positions = _by_unit(item.idxs, item.root_idxs, units)
        if positions is None:
            return f"{names[module]} does not have the same number of channels for each of them"
        cuts[names[module], side] = positions
    if not any(side == "in" for _, side in cuts):
        return "they are the model's output: no layer reads them"
    return Group(name, "channels", tuple(Cut(*key, positions) for key, positions in cuts.items()))


def _by_unit(channels: list[int], roots: list[int], units: int) -> torch.Tensor | None:
    """``(units, width)`` from channels and the unit that each belongs to."""
    if len(channels) % units or any(root is None for root in roots):
        return None
    order = torch.tensor(roots).argsort(stable=True)
    if not torch.equal(
        torch.tensor(roots)[order].view(units, -1), torch.arange(units)[:, None].expand(-1, len(roots) // units)
    ):
        return None
    return torch.tensor(channels)[order].view(units, -1)

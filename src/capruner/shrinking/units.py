"""Units of a network that can be removed as a whole, and where each of them sits in the weights.

A unit is a neuron of an MLP, a head of an attention, or a channel of a convolution. It is computed by rows of one or more layers and read by columns of others;
a :class:`Group` holds the units that are alike, for example the neurons of one MLP. Removing a unit removes its rows and its columns, which is exact once the
columns are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

UnitKind = Literal["neurons", "heads", "channels"]
KINDS: tuple[str, ...] = get_args(UnitKind)
Side = Literal["out", "in"]
HEAD_COUNTS = ("num_heads", "num_attention_heads")
"""What attention modules call the number of their heads: timm, Hugging Face."""
HEAD_WIDTHS = ("attn_dim", "all_head_size")
"""What they call the size of all heads together, where they keep it."""


@dataclass(frozen=True)
class Cut:
    """What the units of a group are in one layer.

    Attributes:
        layer: name of the module.
        side: ``"out"``: output channels (rows of a weight, all of a norm); ``"in"``: input channels (columns).
        positions: ``(units, width)`` int64, the channels of each unit on that side.
    """

    layer: str
    side: Side
    positions: Tensor


@dataclass(frozen=True)
class Group:
    """Units that are alike.

    Attributes:
        name: of the layer that computes them, or of the attention.
        kind: what they are.
        cuts: where they are in the weights.
        attention: name of the attention module whose number of heads changes; empty for neurons and channels.
    """

    name: str
    kind: UnitKind
    cuts: tuple[Cut, ...]
    attention: str = ""

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.cuts[0].positions)

    @property
    def readers(self) -> list[Cut]:
        """The cuts of the layers that read the units; their columns are re-fitted."""
        return [cut for cut in self.cuts if cut.side == "in"]


@dataclass(frozen=True)
class LeftAlone:
    """A module whose units are not removed, and why."""

    name: str
    reason: str


def sliceable(module: nn.Module) -> bool:
    """Whether rows and columns of the layer can be removed: linear layers, convolutions (plain and depthwise), BatchNorm."""
    if isinstance(module, _ConvNd):
        depthwise = module.groups == module.in_channels == module.out_channels
        return not isinstance(module, _ConvTransposeNd) and (module.groups == 1 or depthwise)
    return isinstance(module, nn.Linear | _BatchNorm)


def channels(module: nn.Module, side: Side) -> int:
    """Input or output channels of a layer."""
    if isinstance(module, _BatchNorm):
        return module.num_features
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    assert isinstance(module, _ConvNd)
    return module.out_channels if side == "out" else module.in_channels


def columns(module: nn.Module, positions: Tensor) -> Tensor:
    """Columns of ``module.weight.flatten(1)`` that belong to input channels ``(units, width)``; ``(units, width * kernel)``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    kernel = weight[0, 0].numel()
    return (positions[:, :, None] * kernel + torch.arange(kernel, device=positions.device)).flatten(1)


def own_weights(model: nn.Module, layers: Sequence[str]) -> str | None:
    """Why some of the layers cannot be cut; None: all can.

    A layer is cut only where its parameters are its own and plain: not shared with another layer, not computed by a parametrization.
    """
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    for name in layers:
        module = model.get_submodule(name)
        if not sliceable(module):
            return f"{name} is {type(module).__name__}, whose rows and columns cannot be removed"
        if "weight" not in module._parameters:
            return f"the weight of {name} is computed from other parameters"
        if any(uses[id(p)] > 1 for p in module.parameters(recurse=False)):
            return f"the weights of {name} are shared with another layer"
    return None

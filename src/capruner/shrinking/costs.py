"""What the layers of a model cost: multiply-adds, counted on example inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from capruner.batches import call_model
from capruner.models.macs import Counter, plain_products
from capruner.models.modes import eval_mode
from capruner.models.wrappers import first_names
from capruner.shrinking.budget import Costs
from capruner.shrinking.probing import hooked


@torch.no_grad()
def multiply_adds_of(model: nn.Module, inputs: Any, attentions: Iterable[str] = ()) -> Costs:
    """Multiply-adds of one call with ``inputs``.

    Args:
        attentions: modules whose products of activations are counted apart.
    """
    counter = Counter(first_names(model))
    heads: dict[str, float] = {}
    modules = {model.get_submodule(name): name for name in attentions}

    def before(module: nn.Module, args: Any) -> None:
        heads[modules[module]] = heads.get(modules[module], 0) - counter.activations

    def after(module: nn.Module, args: Any, out: Any) -> None:
        heads[modules[module]] += counter.activations

    hooks = hooked(dict.fromkeys(modules, after), dict.fromkeys(modules, before))
    with eval_mode(model), plain_products(), hooks, counter:
        call_model(model, inputs)
    layers: dict[str, float] = {}
    for name, count in counter.weights.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + count
    return Costs(sum(layers.values()) + counter.activations, layers, heads)

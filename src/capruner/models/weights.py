"""Which weights of a model belong to linear operators, how they are stored, and which weights are left dense.

Linear layers and convolutions store ``(out, in, *kernel)``. Transposed convolutions store ``(in, out, *kernel)``; the ``Conv1D`` of ``transformers`` (GPT-2)
stores ``(in, out)``. N:M patterns, and blocks that hold the inputs of one neuron, need to know which dimension runs over the inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from capruner.distributed import processes
from capruner.models.computed import loses_zeros, parametrization_loses_zeros
from capruner.models.wrappers import first_names, walk

_LOGGER = logging.getLogger(__name__)

LARGE = 0.05
"""Share of a model's weights from which on it is worth a warning that they stay dense."""

NOT_SELECTED = "not in params"
EXCLUDED = "excluded"
FROZEN = "frozen (requires_grad is False)"
_CHOSEN = (NOT_SELECTED, EXCLUDED)  # by the caller, who needs no warning

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class LinearWeight:
    """A weight that a linear operator multiplies activations with.

    Attributes:
        name: its name in the layer that uses it; not always the first of its names.
        layer: that layer.
        inputs: the dimension that runs over inputs (input channels).
        reduction: how many inputs of that dimension one output reads.
    """

    name: str
    layer: nn.Module
    inputs: int
    reduction: int


def _used(module: nn.Module) -> dict[str, tuple[int, int]]:
    """``{attribute: (inputs, groups)}`` of the weights that a module multiplies activations with; () for modules that are not known."""
    if isinstance(module, _TRANSPOSED):
        return {"weight": (0, module.groups)}
    if isinstance(module, _PLAIN):
        return {"weight": (1, 1)}
    if isinstance(module, nn.Bilinear):
        return {"weight": (2, 1)}
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(_ATTENTION, (1, 1))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return {name: (1, 1) for name in module._parameters if name.startswith("weight_")}
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        return {"weight": (0, 1)}
    return {}


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """The weights of all known linear operators, under their first names, in the model's order."""
    found: dict[int, LinearWeight] = {}
    for _, prefix, module in walk(model):
        for attribute, (inputs, groups) in _used(module).items():
            p = module._parameters.get(attribute)
            if p is not None:
                reduction = 0 if nn.parameter.is_lazy(p) else p.shape[inputs] // groups
                found.setdefault(id(p), LinearWeight(prefix + attribute, module, inputs, reduction))
    return {name: found[id(p)] for name, p in first_names(model).items() if id(p) in found}


def computed_weights(model: nn.Module) -> dict[str, str]:
    """``{name of a layer's weight: why its zeros are not those of a parameter}``, as far as the layers themselves tell.

    These are parametrizations, weight norm and ``torch.nn.utils.prune``, whose weights are no parameters, and layers that standardise their weight.
    What a layer's surroundings do to its weight is seen in the first forward pass, see :mod:`capruner.models.computed`.
    """
    found = {}
    for _, prefix, module in walk(model):
        for original in module._parameters if isinstance(module, ParametrizationList) else ():
            if parametrization_loses_zeros(module, original):
                kind = type(module[0]).__name__  # type: ignore[index]
                found[prefix + original] = f"{kind} computes a weight from it in which its zeros would not be zeros"
        for attribute in _used(module):
            if attribute not in module._parameters and hasattr(module, attribute):
                found[prefix + attribute] = (
                    "computed from other parameters (parametrization, weight norm or torch.nn.utils.prune)"
                )
            elif attribute == "weight" and module._parameters.get(attribute) is not None and loses_zeros(module):
                found[prefix + attribute] = (
                    f"{type(module).__name__} computes another weight from it in forward, in which its zeros would not be zeros"
                )
    return found


def tied_to_embeddings(model: nn.Module) -> dict[str, str]:
    """``{first name: embedding}`` of the linear weights that are an embedding's table too."""
    tables = {id(m.weight): prefix.removesuffix(".") for _, prefix, m in walk(model) if isinstance(m, nn.Embedding)}
    weights = linear_weights(model)
    return {name: tables[id(p)] for name, p in first_names(model).items() if name in weights and id(p) in tables}


def left_dense(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], reasons: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The weights of two or more dimensions that are not among ``parameters``: rows of ``name, shape, numel, reason``.

    Args:
        parameters: what is pruned.
        reasons: by name, where the caller knows better.
    """
    selected = {id(p) for p in parameters.values()}
    known = _reasons(model) | dict(reasons or {})
    return [
        {"name": name, "shape": list(p.shape), "numel": p.numel(), "reason": known[name]}
        for name, p in first_names(model).items()
        if p.dim() > 1 and id(p) not in selected
    ]


def _reasons(model: nn.Module) -> dict[str, str]:
    """Why each parameter would be left dense."""
    linear, computed = linear_weights(model), computed_weights(model)
    tied = tied_to_embeddings(model)
    first = {id(p): name for name, p in first_names(model).items()}
    found: dict[str, str] = {}
    for _, prefix, module in walk(model):
        for p in module._parameters.values():
            if p is None or first[id(p)] in found:
                continue
            name = first[id(p)]
            if name in tied:
                found[name] = f"tied to the embedding {tied[name]}"
            elif name in linear:
                found[name] = computed.get(linear[name].name, NOT_SELECTED)
            elif isinstance(module, ParametrizationList) or any(prefix + used in computed for used in _used(module)):
                found[name] = "a weight is computed from it"
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                found[name] = "an embedding"
            elif isinstance(module, _NORMS):
                found[name] = "the scale of a normalization"
            else:
                found[name] = f"a parameter of {type(module).__name__}, which is not a known linear layer"
    return found


def log_selection(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], dense: list[dict[str, Any]], told: Container[str]
) -> None:
    """One log line before the work: what is pruned, and what is left dense; a warning where that is much and nobody asked for it.

    Args:
        told: names of those that there was a warning about.
    """
    if processes().rank != 0:
        return
    total, pruned = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in parameters.values())
    names = list(parameters)
    unasked = sum(row["numel"] for row in dense if row["reason"] not in _CHOSEN and row["name"] not in told)
    largest = sorted(dense, key=lambda row: -row["numel"])[:4]
    _LOGGER.log(
        logging.WARNING if unasked > LARGE * total else logging.INFO,
        "pruning %d weight tensors (%s) with %s of the model's %s weights (%.1f %%); left dense: %s%s",
        len(names),
        names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
        *(f"{pruned:,}", f"{total:,}", 100 * pruned / total),
        ", ".join(f"{row['name']} ({row['numel']:,}: {row['reason']})" for row in largest)
        or "none of two dimensions or more",
        f" and {len(dense) - len(largest)} more" if len(dense) > len(largest) else "",
    )

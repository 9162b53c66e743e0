"""2:4 weights in the form that NVIDIA's sparse tensor cores run."""

from __future__ import annotations

import torch
from torch import nn

from capruner.models.weights import linear_weights

TILE = (32, 64)
"""Multiples of outputs and inputs that torch's 2:4 kernels support in half precision (CUTLASS; cuSPARSELt supports them too)."""


def two_of_four(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Names of the ``Linear`` layers that sparse tensor cores can run as 2:4, and ``{name: reason}`` of the other pruned layers.

    A layer qualifies if each four consecutive inputs keep at most two weights and the matrix has whole tiles (:data:`TILE`).
    """
    fit: list[str] = []
    unfit: dict[str, str] = {}
    for linear in linear_weights(model).values():
        name, _, attribute = linear.name.rpartition(".")
        weight = linear.layer.get_parameter(attribute).detach()
        if not bool((weight == 0).any()):
            continue
        if not isinstance(linear.layer, nn.Linear):
            unfit[name] = f"torch has no 2:4 kernel for {type(linear.layer).__name__}"
        elif weight.shape[0] % TILE[0] or weight.shape[1] % TILE[1]:
            unfit[name] = f"{weight.shape[0]}×{weight.shape[1]} is not a multiple of {TILE[0]}×{TILE[1]}"
        else:
            kept = (weight != 0).unflatten(1, (-1, 4)).sum(dim=2)
            broken = int((kept > 2).sum())
            if broken:
                unfit[name] = f"{broken:,} of {kept.numel():,} groups of four keep more than two weights"
            else:
                fit.append(name)
    return fit, unfit


def to_semi_structured(model: nn.Module, tolerance: float = 1e-2) -> list[str]:
    """Replace, in place, the weights of every 2:4 ``Linear`` by ``torch.sparse.to_sparse_semi_structured``; compare each product with the dense one.

    Args:
        model: float16 or bfloat16, on a GPU with sparse tensor cores (compute capability 8.0 or more).
        tolerance: largest difference of a product, relative to its largest value.

    Returns:
        The converted layers, those of :func:`two_of_four`; the others stay dense.

    Raises:
        RuntimeError: not on such a GPU, or a product differs.
        ValueError: no layer is 2:4, or the weights have another type.
    """
    fit, unfit = two_of_four(model)
    if not fit:
        some = "; ".join(f"{name}: {why}" for name, why in list(unfit.items())[:3])
        raise ValueError(
            f"no Linear layer of this model has 2:4 weights ({some or 'there are no zeros'}): prune with mask_type='2:4' first"
        )
    for name in fit:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise RuntimeError(
                f"2:4 weights need a GPU with sparse tensor cores (compute capability 8.0 or more); {name} is on {weight.device}"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"2:4 weights are float16 or bfloat16, {name} is {weight.dtype}: model.half() first")
        x = torch.randn(64, weight.shape[1], device=weight.device, dtype=weight.dtype)
        dense = x @ weight.mT
        sparse = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        difference = float((nn.functional.linear(x, sparse) - dense).abs().max() / dense.abs().max())
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name}: the 2:4 product differs from the dense one by {difference:.2g} of its largest value"
            )
        layer.weight = sparse
    return fit

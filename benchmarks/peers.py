"""SparseML's pruners on the models of the accuracy benchmark: its modifiers through its own manager, and its SparseGPT layer by layer."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.models.selection import select_parameters

MODIFIERS = {
    "sparseml_obs": "OBSPruningModifier",
    "sparseml_mfac": "MFACPruningModifier",
    "sparseml_magnitude": "GlobalMagnitudePruningModifier",
}
SPARSEML = (*MODIFIERS, "sparsegpt")


def by_sparseml(
    method: str,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    sparsity: float,
    params: list[str],
    num_grads: int,
    **settings: Any,
) -> None:
    """Prune in place.

    Args:
        batches: ``num_grads`` of them, or more, from the start at each iteration.
        settings: fields of the modifier.
    """
    if method == "sparsegpt":
        by_sparsegpt(model, batches, sparsity, params)
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from capruner.sparseml.recipe import apply_at

    fields: dict[str, Any] = {
        "params": list(select_parameters(model, params)),
        "init_sparsity": sparsity,
        "final_sparsity": sparsity,
        "start_epoch": 0.0,
        "end_epoch": 1.0,
        "update_frequency": 1.0,
    }
    if method != "sparseml_magnitude":
        fields |= {"global_sparsity": True, "num_grads": num_grads}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"modifiers:\n  - !{MODIFIERS[method]}\n")
        file.writelines(f"      {key}: {json.dumps(value)}\n" for key, value in (fields | settings).items())
        file.flush()
        sampler = {"data_loader_builder": lambda *_: _samples(batches), "loss_function": F.cross_entropy}
        apply_at(file.name, model, sparsity, sampler)


def _samples(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], dict[str, Any], Tensor]]:
    while True:
        for x, y in batches:
            yield [x], {}, y


class _Fed(Exception):
    """The layer has its inputs: what comes after it need not be computed."""


def _feed(wrapper: Any, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    wrapper.add_batch(inputs[0], output)
    raise _Fed


@torch.no_grad()
def by_sparsegpt(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], sparsity: float, params: list[str]
) -> None:
    """SparseGPT, layer after layer, each on the inputs that the pruned layers before it give; the same sparsity in each.

    SparseML's wrapper needs the package ``transformers`` (any 4.x) and takes Linear layers alone.
    """
    from sparseml.modifiers.obcq.utils.sgpt_wrapper import SparseGptWrapper

    images = torch.cat([x for x, _ in batches]).split(256)  # in what batches they come does not matter to it
    for name in select_parameters(model, params):
        layer = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name}: SparseML's SparseGPT takes Linear layers, this is a {type(layer).__name__}")
        wrapper = SparseGptWrapper(name, layer)
        hook = layer.register_forward_hook(partial(_feed, wrapper))
        for x in images:
            with suppress(_Fed):
                model(x)
        hook.remove()
        wrapper.fasterprune(sparsity)

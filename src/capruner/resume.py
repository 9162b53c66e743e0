"""What a saved run is recognised by, and how its outcomes become tensors of a file and back. The files are :mod:`capruner.state`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from capruner.files import digest
from capruner.gradients import Position
from capruner.identity import batch_digest, model_digest
from capruner.methods import Settings
from capruner.result import Level
from capruner.state import State, StateError


def knobs(settings: Settings, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """What decides the result: settings as JSON values, and a digest of the masks. Where the work is done makes no difference."""
    apart = ("blocks_in_parallel", "fisher_inv_device", "pattern")
    found = {key: value for key, value in asdict(settings).items() if key not in apart}
    masks = None if all(mask.all() for mask in kept.values()) else digest(kept.values())
    return found | {"pattern": str(settings.pattern), "masks": masks}


def fingerprint(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What a saved state has to agree with, besides the arguments."""
    weights = digest(part for named in (*model.named_parameters(), *model.named_buffers()) for part in named)
    shapes = {name: [str(p.dtype), *p.shape] for name, p in parameters.items()}
    return {"parameters": shapes, "weights": weights, "model": model_digest(model)}


def packed(levels: Sequence[Level]) -> dict[str, Tensor]:
    """Levels as the tensors of one file."""
    found = {}
    for index, level in enumerate(levels):
        for name, weight in level.weights.items():
            found[f"{index}/weight/{name}"] = weight
            found[f"{index}/mask/{name}"] = level.masks[name]
            found[f"{index}/loss/{name}"] = torch.tensor(level.losses[name], dtype=torch.float64)
    return found


def unpacked(tensors: Mapping[str, Tensor], index: int, sparsity: float, parameters: Mapping[str, Tensor]) -> Level:
    """The inverse of :func:`packed`, for the layers of one calibration."""
    weights, masks, losses = {}, {}, {}
    for name, p in parameters.items():
        weights[name] = tensors[f"{index}/weight/{name}"].to(p).view(p.shape)
        masks[name] = tensors[f"{index}/mask/{name}"].to(p.device, torch.bool).view(p.shape)
        losses[name] = float(tensors[f"{index}/loss/{name}"])
    return Level(sparsity, weights, masks, losses)


def recall(state: State, notes: dict[str, Any], seconds: dict[str, float]) -> None:
    """Bring the report's counts and the stages' seconds to where an earlier run had left them.

    Raises:
        StateError: the state holds something else in their place.
    """
    found = state.notes
    took, skipped, damped = (
        found.get(k, d) for k, d in (("seconds", {}), ("skipped_batches", 0), ("damped_blocks", {}))
    )
    good = isinstance(took, dict) and all(type(value) in (int, float) for value in took.values())
    good = good and isinstance(damped, dict) and all(_is_count(value) for value in damped.values())
    silent = found.get("layers_without_gradient", [])
    good = good and isinstance(silent, list) and all(isinstance(name, str) for name in silent)
    shares = found.get("shrinkage_by_layer", {})
    good = good and isinstance(shares, dict) and all(type(share) is float for share in shares.values())
    if not (good and _is_count(skipped)):
        raise StateError(
            f"{state.folder} holds counts (skipped_batches, layers_without_gradient, damped_blocks, shrinkage_by_layer, seconds) that are none; {state.remedy}"
        )
    notes |= {
        "skipped_batches": skipped,
        "layers_without_gradient": list(silent),
        "damped_blocks": dict(damped),
        "shrinkage_by_layer": dict(shares),
    }
    seconds |= took


class Record:
    """Digests of the batches of one calibration. Those that an earlier run has drawn are drawn again and compared.

    Args:
        digests: of the batches drawn before; those drawn now are added.
    """

    def __init__(self, state: State, digests: list[str]) -> None:
        self.state, self.digests = state, digests

    def __call__(self, index: int, batch: Any) -> None:
        """Add, or compare, batch number ``index``.

        Raises:
            StateError: it differs from the one drawn before in its place.
        """
        found = batch_digest(batch)
        if index == len(self.digests):
            self.digests.append(found)
        elif found != self.digests[index]:
            raise StateError(
                f"batch {index} of the calibration data differs from the one recorded in {self.state.folder}; cannot resume. "
                f"Pass the same data in the same order (seed what shuffles or augments it), or {self.state.remedy}"
            )


def position_of(place: Mapping[str, Any], num_grads: int) -> tuple[Position, list[str]]:
    """Where the drawing of gradients stood, and the digests of the batches drawn, from what a state says of it.

    Raises:
        ValueError: it cannot be.
    """
    numbers = {key: place[key] for key in ("taken", "batches", "samples", "averaged")}
    skipped = place["skipped"]
    if not isinstance(skipped, list) or not all(map(_is_count, (*numbers.values(), *skipped))):
        raise ValueError(f"{numbers} and {skipped} are no counts")
    if numbers["taken"] > num_grads or any(number >= numbers["batches"] for number in skipped):
        raise ValueError(f"{numbers} and skipped {skipped} are not of {num_grads} gradients")
    digests = place["digests"]
    if not isinstance(digests, list) or len(digests) != numbers["batches"] or not all(type(d) is str for d in digests):
        raise ValueError(f"it has no digest for each of {numbers['batches']} batches")
    return Position(**numbers, skipped=skipped), list(digests)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0

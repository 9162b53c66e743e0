"""What a calibration leaves behind: weights and masks for every sparsity of the list, a report per layer, and a file format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner.bits import pack, unpack
from capruner.checks import check_model, is_number
from capruner.files import digest, reading, save_tensors
from capruner.models.wrappers import all_parameters, find
from capruner.rows import mask_rows

FORMAT = "capruner-result"
VERSION = 2


@dataclass(frozen=True)
class Level:
    """The model at one sparsity.

    Attributes:
        sparsity: the target, a fraction of the prunable weights.
        weights: ``{name: tensor}`` in the parameter's shape and dtype, exactly 0 where the mask is False.
        masks: ``{name: bool tensor}``, True = keep.
        losses: ``{name: predicted increase of the loss}``.
        others: parameters beside the pruned ones that refinement has changed.
        divergence: from the dense network's outputs, once :func:`capruner.measure_divergence` has measured it.
    """

    sparsity: float
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    losses: Mapping[str, float]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    divergence: float | None = None

    def measured(self, divergence: float) -> Level:
        """A copy with that divergence."""
        return replace(self, divergence=divergence)

    def to(self, parameters: Mapping[str, Tensor]) -> Level:
        """A copy on the devices of these parameters, in their order.

        Raises:
            KeyError: a parameter is absent.
        """
        device = next(iter(parameters.values())).device
        return replace(
            self,
            weights={name: self.weights[name].to(p) for name, p in parameters.items()},
            masks={name: self.masks[name].to(p.device) for name, p in parameters.items()},
            losses={name: self.losses[name] for name in parameters},
            others={name: value.to(device) for name, value in self.others.items()},
        )

    @classmethod
    def merge(cls, levels: Sequence[Level]) -> Level:
        """One level out of the same level of several groups of layers."""
        parts: list[dict[str, Any]] = [{}, {}, {}]
        for level in levels:
            for whole, part in zip(parts, (level.weights, level.masks, level.losses)):
                whole |= part
        weights, masks, losses = parts
        return cls(levels[0].sparsity, weights, masks, losses)


@dataclass(repr=False)
class PruningResult:
    """The outcome of :func:`capruner.prune`: one calibration, any sparsity of its list.

    Attributes:
        method: the pruning method's name.
        levels: one per sparsity, ascending.
        total_weights: weights of the whole model, the ones that were not prunable included.
        settings: the calibration's arguments, as JSON values.
        timings: seconds by stage (gradients, fisher, eliminate, allocate, compensate).
    """

    method: str
    levels: list[Level]
    total_weights: int
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = [mask.numel() for mask in self.levels[0].masks.values()] if self.levels else []
        return (
            f"PruningResult(method={self.method!r}, sparsities={self.sparsities}, layers={len(sizes)}, "
            f"prunable_weights={sum(sizes)}, total_weights={self.total_weights})"
        )

    @property
    def sparsities(self) -> list[float]:
        """The sparsities in reach, ascending."""
        return [level.sparsity for level in self.levels]

    def level(self, sparsity: float | None = None) -> Level:
        """The level of that sparsity; the only one when None.

        Raises:
            ValueError: the calibration did not solve for it.
        """
        if sparsity is not None and not is_number(sparsity):
            raise ValueError(f"sparsity must be a number, one of {self.sparsities}, got {sparsity!r}")
        if sparsity is None and len(self.levels) == 1:
            return self.levels[0]
        if sparsity is None:
            raise ValueError(f"this result holds several sparsities, {self.sparsities}: say which one")
        for level in self.levels:
            if abs(level.sparsity - sparsity) < 1e-9:
                return level
        raise ValueError(
            f"sparsity {sparsity} is not in reach: this result holds {self.sparsities}; put it into the list that prune() solves for"
        )

    @torch.no_grad()
    def apply(self, model: nn.Module, sparsity: float | None = None) -> None:
        """Write the weights of that sparsity into ``model``, in place. All or nothing: a model that does not fit is not touched.

        Raises:
            ValueError: sparsity not in reach, or a parameter is missing or has another shape.
        """
        level = self.level(sparsity)
        check_model(model)
        parameters = all_parameters(model)
        values = {find(parameters, name): value for name, value in {**level.weights, **level.others}.items()}
        for name, weight in values.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name}: this result belongs to another architecture")
            if parameters[name].shape != weight.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameters[name].shape)} in the model, {tuple(weight.shape)} in the result"
                )
        for name, weight in values.items():
            parameters[name].copy_(weight)

    def masks(self, sparsity: float | None = None) -> dict[str, Tensor]:
        """``{parameter name: bool tensor, True = keep}``."""
        return dict(self.level(sparsity).masks)

    def predicted_loss(self, sparsity: float | None = None) -> float:
        """Increase of the mean loss of a sample that the quadratic model predicts, ``½ δᵀ F δ``; after recomputations the sum over their steps.

        Good for comparing layers and levels. The quadratic model is blind to what blocks do to each other, so that at high sparsity the true loss rises
        several times as much.
        """
        return sum(self.level(sparsity).losses.values())

    def layer_report(self, sparsity: float | None = None) -> list[dict[str, Any]]:
        """One row per layer: ``name, shape, numel, zeros, sparsity, predicted_loss``."""
        level = self.level(sparsity)
        return [row | {"predicted_loss": level.losses[row["name"]]} for row in mask_rows(level.masks)]

    def model_sparsity(self, sparsity: float | None = None) -> tuple[float, float]:
        """Share of zeros over the prunable weights, and over all weights of the model."""
        masks = self.level(sparsity).masks.values()
        zeros = sum(int((~mask).sum()) for mask in masks)
        return zeros / sum(mask.numel() for mask in masks), zeros / self.total_weights

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (no pickle); masks take one bit per weight.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        tensors, levels = pack_levels(self.levels)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "total_weights": self.total_weights,
            "settings": self.settings,
            "timings": self.timings,
            "levels": levels,
        }
        header = json.loads(json.dumps(header, default=str))
        header["sha256"] = _checksum(header, sorted(tensors.items()))
        save_tensors(path, tensors, header)


def load_result(path: str | Path) -> PruningResult:
    """Read what :meth:`PruningResult.save` wrote.

    Raises:
        ValueError: the file is not one of ours, is damaged, or comes from a newer version.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    with reading(path, FORMAT, VERSION, "pruning result of capruner") as (header, file):
        _check_header(header)
        levels = unpack_levels(file.get_tensor, header["levels"])
        result = PruningResult(header["method"], levels, header["total_weights"], header["settings"], header["timings"])
        tensors = ((key, file.get_tensor(key)) for key in sorted(file.keys()))
        # The first version had none in the beginning, and later one of the tensors alone.
        expected = header["sha256"] if header["version"] > 1 else header.get("sha256")
        if expected is not None and expected != _checksum(header, tensors):
            raise ValueError(f"{path} is damaged: its checksum is wrong")
    for level in levels:
        for name, weight in level.weights.items():
            if weight[~level.masks[name]].any() or not torch.isfinite(weight).all():
                raise ValueError(
                    f"{path} is damaged: {name} has weights that are not 0 where its mask removes them, or not finite"
                )
        for name, value in level.others.items():
            if not value.is_floating_point() or not torch.isfinite(value).all() or name in level.weights:
                raise ValueError(f"{path} is damaged: {name} is not finite, or there twice")
    return result


def _checksum(header: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of everything in the file but itself."""
    if header["version"] == 1:
        return digest(part for named in tensors for part in named)
    rest = {key: value for key, value in header.items() if key != "sha256"}
    named = (part for name, tensor in tensors for part in (name, f"{tensor.dtype} {tuple(tensor.shape)}", tensor))
    return digest(itertools.chain([rest], named))


def _check_header(header: Mapping[str, Any]) -> None:
    """Raises ``TypeError`` for values that :meth:`PruningResult.save` does not write."""
    kinds = {"method": str, "total_weights": int, "settings": dict, "timings": dict, "levels": list}
    for key, kind in kinds.items():
        if not isinstance(header[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")
    if header["total_weights"] < 1 or not header["levels"]:
        raise TypeError("it has no weights, or no levels")
    if not all(type(value) in (int, float) for value in header["timings"].values()):
        raise TypeError("timings that are no numbers")


def pack_levels(levels: Sequence[Level]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Levels as the tensors, on the CPU, and the JSON values of a file: of a result or of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for index, level in enumerate(levels):
        for name, weight in level.weights.items():
            tensors[f"{index}/weight/{name}"] = weight.detach().cpu().contiguous()
            tensors[f"{index}/mask/{name}"] = pack(level.masks[name])
        for name, value in level.others.items():
            tensors[f"{index}/other/{name}"] = value.detach().cpu().contiguous()
    return tensors, [
        {"sparsity": x.sparsity, "losses": dict(x.losses), "others": list(x.others)}
        | ({} if x.divergence is None else {"divergence": x.divergence})
        for x in levels
    ]


def unpack_levels(tensor: Callable[[str], Tensor], entries: Sequence[Mapping[str, Any]]) -> list[Level]:
    """The inverse of :func:`pack_levels`, on the CPU.

    Args:
        tensor: returns the tensor of a name.

    Raises:
        TypeError, KeyError: tensors or entries that :func:`pack_levels` does not write.
    """
    levels = []
    for index, entry in enumerate(entries):
        numbers = [entry["sparsity"], *entry["losses"].values(), entry.get("divergence", 0.0)]
        if not entry["losses"] or not all(type(number) in (int, float) for number in numbers):
            raise TypeError("a level without layers, or whose sparsity or losses are not numbers")
        if not 0 <= entry["sparsity"] <= 1:
            raise TypeError(f"a sparsity of {entry['sparsity']}")
        weights = {name: tensor(f"{index}/weight/{name}") for name in entry["losses"]}
        if wrong := [f"{name} is {weight.dtype}" for name, weight in weights.items() if not weight.is_floating_point()]:
            raise TypeError(wrong[0])
        masks = {name: unpack(tensor(f"{index}/mask/{name}"), w.shape, name) for name, w in weights.items()}
        others = {name: tensor(f"{index}/other/{name}") for name in entry.get("others", [])}  # version 1 has none
        levels.append(Level(entry["sparsity"], weights, masks, entry["losses"], others, entry.get("divergence")))
    return levels

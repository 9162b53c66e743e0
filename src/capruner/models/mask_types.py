"""Which weights of a model can hold a mask type."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from capruner.core.patterns import Pattern
from capruner.models.selection import SelectionError
from capruner.models.weights import LinearWeight
from capruner.text import some


def unsupported(pattern: Pattern, parameters: Mapping[str, Tensor], linear: Mapping[str, LinearWeight]) -> list[str]:
    """Names of the parameters that cannot hold ``pattern``: their reduction dimension is missing, or not a multiple of the group.

    Args:
        linear: the model's linear weights; others are taken to be ``(out, in, ...)``.
    """
    if pattern.group == 1:
        return []
    return [
        name
        for name, p in parameters.items()
        if p.dim() < 2 or (linear[name].reduction if name in linear else p.shape[1]) % pattern.group
    ]


def supporting(
    pattern: Pattern, parameters: Mapping[str, nn.Parameter], skip_unsupported: bool, linear: Mapping[str, LinearWeight]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The parameters that can hold ``pattern``, and the names of the others; raise ``SelectionError`` if these may not be skipped."""
    bad = unsupported(pattern, parameters, linear)
    if bad and not skip_unsupported:
        shapes = some([f"{name} {tuple(parameters[name].shape)}" for name in bad], 8)
        ahead = "|".join(name.replace(".", r"\.") for name in bad)
        raise SelectionError(
            f"{pattern} needs weights whose inputs (input channels per group) are a multiple of {pattern.group}; these are not: {shapes}. "
            f"Leave them dense with skip_unsupported=True or with exclude; in a recipe, a pattern that begins with 're:(?!(?:{ahead})$)' passes them over"
        )
    if len(bad) == len(parameters):
        raise SelectionError(f"none of the selected parameters can hold {pattern}: {', '.join(bad[:8])}")
    return {name: p for name, p in parameters.items() if name not in set(bad)}, bad

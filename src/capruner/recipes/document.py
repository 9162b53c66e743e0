"""YAML of a recipe into its modifiers: names and plain values, with variables and ``eval(...)`` put in. No object of Python is ever made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from capruner.recipes.arithmetic import UnknownVariableError, calculate


@dataclass(frozen=True)
class Modifier:
    """``!Name`` of a recipe with its parameters."""

    name: str
    values: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML's plain values, and modifiers; a key that is given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(twice)} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _modifier(loader: _Loader, name: str, node: yaml.Node) -> Modifier:
    values = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    odd = [key for key in values if not isinstance(key, str)]
    if odd:
        raise yaml.constructor.ConstructorError(None, None, f"{name} has no parameter {odd[0]!r}", node.start_mark)
    values.pop("log_types", None)  # old recipes have it, and SparseML passes over it
    return Modifier(name, values)


_Loader.add_multi_constructor("!", _modifier)


def modifiers(text: str) -> list[Modifier]:
    """The modifiers of a recipe's YAML, in its order, staged or not.

    Raises:
        yaml.YAMLError: it is not YAML, or a tag is no modifier.
        ValueError: it is no recipe, or an ``eval(...)`` cannot be calculated.
    """
    container = yaml.load(text, _Loader)
    if isinstance(container, Modifier):
        container = {"modifiers": [container]}
    elif isinstance(container, list):
        container = {"modifiers": container}
    if not isinstance(container, dict):
        raise ValueError("it has no modifiers; they are listed under a key that ends with modifiers")
    stages = [value for value in container.values() if _is_stage(value)]
    if not stages:
        return _of_stage(container, {})
    if any(_is_group(key) for key in container):
        raise ValueError("it has modifiers inside of stages and outside of them; put all into stages")
    shared = {key: value for key, value in container.items() if not _is_stage(value)}
    return [modifier for stage in stages for modifier in _of_stage(stage, shared)]


def _is_group(key: Any) -> bool:
    return isinstance(key, str) and "modifiers" in key


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and any(_is_group(key) for key in value)


def _of_stage(stage: dict[Any, Any], shared: dict[Any, Any]) -> list[Modifier]:
    """The modifiers of one stage; its own variables stand above those that all stages share."""
    found: list[Modifier] = []
    variables = _variables(shared | {key: value for key, value in stage.items() if not _is_group(key)})
    for key, value in stage.items():
        listed = value if isinstance(value, list) else [value]
        if not _is_group(key):
            if any(isinstance(item, Modifier) for item in listed):
                raise ValueError(f"{key} lists modifiers, but its name does not end with modifiers; rename it")
            continue
        wrong = [item for item in listed if not isinstance(item, Modifier)]
        if wrong or not isinstance(value, list):
            raise ValueError(
                f"{key} must be a list of modifiers, !Name with parameters, got {wrong[0] if wrong else value!r}"
            )
        found += [Modifier(m.name, {k: _filled_in(v, variables) for k, v in m.values.items()}) for m in listed]
    return found


def _variables(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Variables with their ``eval(...)`` calculated, in whatever order they depend on each other."""
    known = {name: value for name, value in given.items() if not _is_expression(value)}
    waiting = {name: value for name, value in given.items() if name not in known}
    while waiting:
        unknown: UnknownVariableError | None = None
        ready: dict[Any, Any] = {}
        for name, expression in waiting.items():
            try:
                ready[name] = _filled_in(expression, known)
            except UnknownVariableError as error:
                unknown = error
        if not ready:
            raise ValueError(f"{', '.join(map(str, waiting))} cannot be calculated: {unknown}")
        known |= ready
        waiting = {name: value for name, value in waiting.items() if name not in ready}
    return known


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("eval(") and value.endswith(")")


def _filled_in(value: Any, variables: Mapping[Any, Any]) -> Any:
    if isinstance(value, list):
        return [_filled_in(item, variables) for item in value]
    if isinstance(value, dict):
        return {_filled_in(key, variables): _filled_in(item, variables) for key, item in value.items()}
    if not _is_expression(value):
        return value
    expression = value[len("eval(") : -1]
    if expression in variables:  # of any type, such as a list of layers
        return variables[expression]
    numbers = {n: v for n, v in variables.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return calculate(expression, numbers)

"""Which parameters to prune: names, module names, ``re:`` patterns, ``__ALL__`` and ``__ALL_PRUNABLE__``.

A pattern that misses what its author meant is the quietest way to ruin an experiment: ``attn.[qkv].weight`` never matches timm's ``attn.qkv.weight``, and as
long as another alternative of the same pattern matches, nobody is told. So every entry, and every ``|`` alternative of every pattern, has to match something.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from capruner.wrappers import all_parameters, find, first_names, unwrap, walk

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
PRUNABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_NEVER = "(?!)"  # matches nothing; put before an alternative it switches that alternative off and leaves group numbers as they are
_LETTERS = re.compile(r"\[([A-Za-z]\w+)\]")
PATIENCE, MANY_REPETITIONS = 10.0, 5
_REPEATED_GROUP, _REPETITION = re.compile(r"\)[*+{]"), re.compile(r"(?<!\()[*+?{]")
_MATCH = "import json, re, sys; pattern, names = json.load(sys.stdin); compiled = re.compile(pattern); [compiled.match(name) for name in names]"


class SelectionError(ValueError):
    """``params`` does not say which parameters to prune, or names some that cannot be pruned."""


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that ``__ALL_PRUNABLE__`` stands for: Linear and Conv1d/2d/3d by name, in the model's order, a shared layer once."""
    found = {
        id(m): (plain.removesuffix("."), m)
        for _, plain, m in reversed([*walk(model)])
        if isinstance(m, PRUNABLE_LAYERS)
    }
    return dict(reversed(found.values()))


def select_parameters(model: nn.Module, params: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that ``params`` names.

    Args:
        model: any module; wrappers are looked through.
        params: one entry or several. An entry is the name of a parameter; the name of a module, for the Linear and convolution weights in it;
            ``re:PATTERN``, matched from the start of full parameter names as ``re.match`` does; ``__ALL__`` for every parameter;
            ``__ALL_PRUNABLE__`` for the weights of all Linear and convolution layers.

    Returns:
        ``{name: parameter}`` in the order of ``model.named_parameters()``; a parameter with several names appears once, under the first.

    Raises:
        SelectionError: ``params`` is empty, an entry or one alternative of a pattern matches nothing, a pattern is no regular expression, or a
            selected parameter is frozen or not floating point.
    """
    model = unwrap(model)
    entries = [params] if isinstance(params, str) else list(params)
    if not entries:
        raise SelectionError(f"params is empty; name parameters or modules, or use '{ALL_PRUNABLE}'")
    names = all_parameters(model)
    selected = {id(names[name]) for entry in entries for name in _resolve(model, entry, names)}
    found = {name: parameter for name, parameter in first_names(model).items() if id(parameter) in selected}
    integer = [name for name, parameter in found.items() if not parameter.is_floating_point()]
    if integer:
        raise SelectionError(f"not floating point, so without a gradient: {_some(integer)}; leave them out of params")
    frozen = [name for name, parameter in found.items() if not parameter.requires_grad]
    if frozen:
        raise SelectionError(
            f"frozen (requires_grad is False), so without a gradient: {_some(frozen)}; "
            "call .requires_grad_(True) on them, or leave them out of params"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _resolve(model: nn.Module, entry: str, names: dict[str, nn.Parameter]) -> list[str]:
    """The names that one entry of ``params`` stands for; never empty."""
    if not isinstance(entry, str):
        raise SelectionError(f"an entry of params must be a string, got {entry!r}")
    if entry.startswith("re:"):
        return _match(entry, names)
    if find(names, entry) in names:
        return [find(names, entry)]
    if entry == ALL:
        found = list(names)
    elif entry == ALL_PRUNABLE:
        found = _layer_weights("", model, names)
    else:
        modules = {plain.removesuffix("."): module for _, plain, module in walk(model)}
        entry = find(modules, entry)
        if entry not in modules or not entry:
            near = _nearest(entry, [*names, *filter(None, modules)])
            raise SelectionError(f"params: no parameter or module is called '{entry}'{near}")
        found = _layer_weights(entry, modules[entry], names)
    if not found:
        raise SelectionError(f"params: '{entry}' holds no Linear or convolution layer; name the parameters themselves")
    return found


def _layer_weights(prefix: str, module: nn.Module, names: dict[str, nn.Parameter]) -> list[str]:
    layers = [".".join(filter(None, (prefix, name))) for name in prunable_layers(module)]
    weights = [f"{layer}.weight" if layer else "weight" for layer in layers]
    computed = [weight for weight in weights if weight not in names]
    if computed:
        raise SelectionError(
            f"params: these weights are computed from other parameters (parametrization, weight norm or torch.nn.utils.prune): "
            f"{_some(computed)}; undo that first, for example with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return weights


# Patterns


@dataclass(eq=False)
class _Alternative:
    """One side of a ``|``: where it stands in the pattern, the group of alternatives it belongs to, and the alternative around that group."""

    start: int
    parent: _Alternative | None
    siblings: list[_Alternative]
    end: int = -1


def _alternatives(pattern: str) -> list[_Alternative]:
    """All alternatives of a valid pattern, at every depth; where there is no ``|``, the whole group is its only alternative.

    Escapes, character classes and comments are stepped over. ``(?x)`` patterns with a ``|`` in an end-of-line comment are not understood.
    """
    found: list[_Alternative] = []

    def begin(start: int, parent: _Alternative | None, siblings: list[_Alternative]) -> _Alternative:
        alternative = _Alternative(start, parent, siblings)
        siblings.append(alternative)
        found.append(alternative)
        return alternative

    # Flags such as (?i) have to stay in front of everything.
    position = len(re.match(r"(?:\(\?[a-zA-Z]+\))*", pattern).group())  # type: ignore[union-attr]
    current = begin(position, None, [])
    skip = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?P=\w+\)", re.DOTALL)
    opening = re.compile(r"\((?:\?(?:P?<\w+>|<?[=!]|\(\w+\)|[a-zA-Z]*(?:-[a-zA-Z]+)?:|>))?")
    while position < len(pattern):
        if match := skip.match(pattern, position):
            position = match.end()
        elif match := opening.match(pattern, position):
            position = match.end()
            current = begin(position, current, [])
        else:
            if pattern[position] in "|)":
                current.end = position
                if pattern[position] == "|":
                    current = begin(position + 1, current.parent, current.siblings)
                else:
                    assert current.parent is not None  # the pattern compiles, so its brackets are balanced
                    current = current.parent
            position += 1
    current.end = len(pattern)
    return found


def _without(pattern: str, off: Iterable[_Alternative]) -> str:
    """``pattern`` with some alternatives switched off."""
    for start in sorted((alternative.start for alternative in off), reverse=True):
        pattern = pattern[:start] + _NEVER + pattern[start:]
    return pattern


def check_time(entry: str, names: Iterable[str]) -> None:
    """Match ``names`` in a process of its own if the pattern could take time exponential in their length, as ``(.*)*x$`` does.

    Raises:
        SelectionError: it takes longer than :data:`PATIENCE`.
    """
    pattern = entry.removeprefix("re:")
    if not _REPEATED_GROUP.search(pattern) and len(_REPETITION.findall(pattern)) < MANY_REPETITIONS:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([pattern, list(names)]).encode(),
            timeout=PATIENCE,
            check=False,  # what is no regular expression is said when it is used
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise SelectionError(
            f"params: matching '{entry}' takes longer than {PATIENCE:g} s; write it without repetitions inside of repetitions, .* for (.*)* for example"
        ) from None


def _match(entry: str, names: dict[str, nn.Parameter]) -> list[str]:
    pattern = entry.removeprefix("re:")
    check_time(entry, names)

    def matches(expression: str) -> list[str]:
        compiled = re.compile(expression)
        return [name for name in names if compiled.match(name)]

    try:
        found = matches(pattern)
    except re.error as error:
        raise SelectionError(f"params: '{entry}' is not a regular expression: {error}") from None
    if not found:
        hint = _class_hint(pattern, matches)
        raise SelectionError(f"params: no parameter name matches '{entry}'{hint}{_nearest(pattern, names)}")
    for alternative in _alternatives(pattern):
        if len(alternative.siblings) < 2:
            continue
        path: _Alternative | None = alternative
        others: list[_Alternative] = []
        while path is not None:
            others += [sibling for sibling in path.siblings if sibling is not path]
            path = path.parent
        alone = _without(pattern, others)
        # In a repeated group an alternative may need the others beside it; then it counts when the pattern would match less without it.
        if not matches(alone) and matches(_without(pattern, [alternative])) == found:
            text = pattern[alternative.start : alternative.end]
            raise SelectionError(
                f"params: the alternative '{text}' of '{entry}' matches no parameter name, although others of its pattern do"
                f"{_class_hint(alone, matches)}{_nearest(text, names)}"
            )
    return found


def _class_hint(pattern: str, matches: Callable[[str], list[str]]) -> str:
    """Whether a class of letters, ``[qkv]``, was meant as the word ``qkv``: it was, if the pattern then matches."""
    classes = [found.group() for found in _LETTERS.finditer(pattern)]
    if classes and matches(_LETTERS.sub(r"\1", pattern)):
        return f"; {', '.join(classes)} stands for one single letter: without the brackets it would match"
    return ""


def _nearest(wanted: str, names: Iterable[str]) -> str:
    """The three names nearest to ``wanted``, which may be a pattern or the last part of a name."""
    plain = re.sub(r"\\[dw]|[\\^$()\[\]?*+]", "", wanted)
    tails: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            tails.setdefault(".".join(parts[first:]), name)
    near = difflib.get_close_matches(plain, list(tails), n=6, cutoff=0.5)
    chosen = list(dict.fromkeys(tails[tail] for tail in near))[:3]
    return (
        f"; the nearest names are {', '.join(chosen)}"
        if chosen
        else f"; there are {_some(list(dict.fromkeys(tails.values())))}"
    )

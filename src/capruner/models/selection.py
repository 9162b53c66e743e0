"""Which parameters to prune: names, module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__`` and ``__BLOCKS__``.

A pattern that misses what its author meant is the quietest way to ruin an experiment: ``attn.[qkv].weight`` never matches timm's ``attn.qkv.weight``, and as
long as another alternative of the same pattern matches, nobody is told. So every entry, and every ``|`` alternative of every pattern, has to match something.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from capruner.models.weights import EXCLUDED, FROZEN, computed_weights, linear_weights, tied_to_embeddings
from capruner.models.wrappers import all_parameters, find, first_names, walk
from capruner.presets import BLOCKS, stem_and_head
from capruner.text import some

_LOGGER = logging.getLogger(__name__)

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"

_NEVER = "(?!)"  # matches nothing; put before an alternative it switches that alternative off and leaves group numbers as they are
_LETTERS = re.compile(r"\[([A-Za-z]\w+)\]")
PATIENCE, MANY_REPETITIONS = 10.0, 5
_REPEATED_GROUP, _REPETITION = re.compile(r"\)[*+{]"), re.compile(r"(?<!\()[*+?{]")
_MATCH = "import json, re, sys; pattern, names = json.load(sys.stdin); compiled = re.compile(pattern); [compiled.match(name) for name in names]"


class SelectionError(ValueError):
    """``params`` does not say which parameters to prune, or names some that cannot be pruned."""


@dataclass(frozen=True)
class Selection:
    """What an expression stands for.

    Attributes:
        parameters: ``{first name: parameter}`` in the model's order.
        passed: ``{first name: reason}`` of those that it stands for too, and that are left dense.
    """

    parameters: dict[str, nn.Parameter]
    passed: dict[str, str]


def select_parameters(
    model: nn.Module, params: str | Sequence[str], exclude: str | Sequence[str] = (), *, trainable: bool = True
) -> dict[str, nn.Parameter]:
    """The parameters that ``params`` names; see :func:`select`."""
    return select(model, params, exclude, trainable=trainable).parameters


def select(
    model: nn.Module, params: str | Sequence[str], exclude: str | Sequence[str] = (), *, trainable: bool = True
) -> Selection:
    """The parameters that ``params`` names, without those that cannot be pruned.

    Args:
        model: any module; wrappers are looked through.
        params: one entry or several. An entry is the name of a parameter; the name of a module, for the weights of the linear layers in it;
            ``re:PATTERN``, matched from the start of full parameter names as ``re.match`` does; ``__ALL__`` for every parameter;
            ``__ALL_PRUNABLE__`` for the weights of all linear layers: Linear, convolutions and transposed convolutions, attention, recurrent layers,
            and the ``Conv1D`` of transformers, except weights that are tied to an embedding. ``__BLOCKS__``: these without the stem (the first
            convolution and what belongs to it) and the head (the classifier), which published recipes leave dense.
        exclude: parameters that stay dense: names, names of modules (everything in them), or ``re:`` patterns.
        trainable: leave out frozen parameters, with a warning. An entry that stands for nothing else is an error.

    Returns:
        The selection; a parameter with several names appears once, under the first.

    Raises:
        SelectionError: ``params`` is empty; an entry, or one alternative of a pattern, matches nothing; a pattern is not a regular expression; an entry
            stands for parameters that are frozen, not floating point, or computed in ``forward``.
    """
    entries = _entries("params", params)
    if not entries:
        raise SelectionError(f"params is empty; name parameters or modules, or use '{ALL_PRUNABLE}'")
    names = all_parameters(model)
    first = {id(p): name for name, p in first_names(model).items()}
    excluded = {name for entry in _entries("exclude", exclude) for name in _excluded(model, entry, names)}
    chosen: set[str] = set()
    passed: dict[str, str] = {}
    for entry in entries:
        found, computed = _resolve(model, entry, names, _aliases(names, excluded))
        passed |= computed
        found = [name for name in found if first[id(names[name])] not in excluded]
        frozen = [n for n in found if trainable and names[n].is_floating_point() and not names[n].requires_grad]
        if found and len(frozen) == len(found):
            raise SelectionError(
                f"frozen (requires_grad is False), so without a gradient: {some(frozen)}; "
                "call .requires_grad_(True) on them, or leave them out of params"
            )
        passed |= {first[id(names[name])]: FROZEN for name in frozen}
        chosen |= {first[id(names[name])] for name in found if name not in set(frozen)}
    passed = {name: reason for name, reason in passed.items() if name not in chosen} | dict.fromkeys(excluded, EXCLUDED)
    parameters = {name: p for name, p in first_names(model).items() if name in chosen and name not in passed}
    _check(parameters)
    if not parameters:
        raise SelectionError(f"params: nothing is left to prune; {_why(passed)}")
    told = {name: reason for name, reason in passed.items() if reason != EXCLUDED}
    if told:
        _LOGGER.warning("left dense: %s", _why(told))
    return Selection(parameters, passed)


def _entries(what: str, entries: str | Sequence[str]) -> list[str]:
    listed = [entries] if isinstance(entries, str) else list(entries)
    for entry in listed:
        if not isinstance(entry, str):
            raise SelectionError(f"an entry of {what} must be a string, got {entry!r}")
    return listed


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    integer = [name for name, p in parameters.items() if not p.is_floating_point()]
    if integer:
        raise SelectionError(f"not floating point, so without a gradient: {some(integer)}; leave them out of params")
    lazy = [name for name, p in parameters.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise SelectionError(
            f"without a shape until the model has run once: {some(lazy)}; call the model on a batch first"
        )


def _why(passed: Mapping[str, str]) -> str:
    """Names by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in passed.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{some(names)}: {reason}" for reason, names in by_reason.items())


def _excluded(model: nn.Module, entry: str, names: Mapping[str, nn.Parameter]) -> list[str]:
    """The first names of the parameters that one entry of ``exclude`` stands for; never empty."""
    modules = {plain.removesuffix(".") for _, plain, _ in walk(model)}
    known = find(names, entry)
    inside = find(dict.fromkeys(modules), entry)
    if entry.startswith("re:"):
        found = _match("exclude", entry, names)
    elif known in names:
        found = [known]
    else:
        found = [name for name in names if inside in modules and inside and name.startswith(f"{inside}.")]
    if not found:
        raise SelectionError(
            f"exclude: no parameter, and no module with parameters, is called '{entry}'{_nearest(entry, [*names, *filter(None, modules)])}"
        )
    first = {id(p): name for name, p in first_names(model).items()}
    return [first[id(names[name])] for name in found]


def _resolve(
    model: nn.Module, entry: str, names: dict[str, nn.Parameter], excluded: set[str]
) -> tuple[list[str], dict[str, str]]:
    """The names that one entry of ``params`` stands for, and those of computed weights among them, with the reason; not both empty."""
    computed = computed_weights(model)
    tied = set(tied_to_embeddings(model))
    if entry == ALL_PRUNABLE:
        return _layer_weights("", model, _aliases(names, tied), computed)
    if entry == BLOCKS:
        found, reasons = _layer_weights("", model, _aliases(names, tied), computed)
        around = stem_and_head(model, found, {name: names[name].numel() for name in found})
        return _all_but(found, around), reasons
    modules = {plain.removesuffix("."): module for _, plain, module in walk(model)}
    if entry.startswith("re:"):
        found = _match("params", entry, names)
    elif find(names, entry) in names:
        found = [find(names, entry)]
    elif entry == ALL:
        found = list(names)
    else:
        entry = find(modules, entry)
        if entry not in modules or not entry:
            near = _nearest(entry, [*names, *filter(None, modules)])
            raise SelectionError(f"params: no parameter or module is called '{entry}'{near}")
        return _layer_weights(entry, modules[entry], _aliases(names, tied), computed)
    if wrong := [name for name in found if name in computed and name not in excluded]:
        raise SelectionError(
            f"params: {some(wrong)}: {computed[wrong[0]]}; leave them dense with exclude={wrong[:5]!r}"
        )
    if not found:
        raise SelectionError(f"params: '{entry}' holds no parameter")
    return found, {}


def _all_but(found: list[str], around: set[str]) -> list[str]:
    blocks = [name for name in found if name not in around]
    if not blocks:
        raise SelectionError(f"params: '{BLOCKS}' holds nothing but stem and head: {some(found)}; name the parameters")
    return blocks


def _aliases(names: Mapping[str, nn.Parameter], some: set[str]) -> set[str]:
    """All names of the parameters whose first names these are."""
    ids = {id(names[name]) for name in some}
    return {name for name, p in names.items() if id(p) in ids}


def _layer_weights(
    prefix: str, module: nn.Module, tied: set[str], computed: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The linear weights in a module, but those that are tied to an embedding unless the module is that one layer."""
    ahead = f"{prefix}." if prefix else ""
    weights = {ahead + found.name: found for found in linear_weights(module).values()}
    found = [n for n, w in weights.items() if n not in computed and (n not in tied or w.layer is module)]
    reasons = {name: reason for name, reason in computed.items() if name.startswith(ahead)}
    if not found and reasons:
        raise SelectionError(
            f"params: {some(list(reasons))}: {next(iter(reasons.values()))}. Undo that first, for example with "
            "torch.nn.utils.parametrize.remove_parametrizations, or prune other layers"
        )
    if not found:
        more = "but weights that are tied to an embedding" if weights else "whose weight is known"
        raise SelectionError(
            f"params: '{prefix or ALL_PRUNABLE}' holds no Linear, convolution, attention or recurrent layer {more}; name the parameters themselves"
        )
    return found, reasons


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


def check_time(entry: str, names: Iterable[str], what: str = "params") -> None:
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
            f"{what}: matching '{entry}' takes longer than {PATIENCE:g} s; write it without repetitions inside of repetitions, .* for (.*)* for example"
        ) from None


def _match(what: str, entry: str, names: Mapping[str, nn.Parameter]) -> list[str]:
    pattern = entry.removeprefix("re:")
    check_time(entry, names, what)

    def matches(expression: str) -> list[str]:
        compiled = re.compile(expression)
        return [name for name in names if compiled.match(name)]

    try:
        found = matches(pattern)
    except re.error as error:
        raise SelectionError(f"{what}: '{entry}' is not a regular expression: {error}") from None
    if not found:
        hint = _class_hint(pattern, matches)
        raise SelectionError(f"{what}: no parameter name matches '{entry}'{hint}{_nearest(pattern, names)}")
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
                f"{what}: the alternative '{text}' of '{entry}' matches no parameter name, although others of its pattern do"
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
        else f"; there are {some(list(dict.fromkeys(tails.values())))}"
    )

"""SparseML recipes: load one, find its pruning modifier, apply it at another sparsity."""

from __future__ import annotations

import ast
import importlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from capruner.selection import check_time
from capruner.sparseml.base import CorrelationAwareModifier  # first: importing it registers our modifiers
from research.utils.cli import UserError

# isort: split
import torch
from sparseml.pytorch.optim import ScheduledModifierManager
from sparseml.pytorch.sparsification.pruning import BasePruningModifier, MFACPruningModifier
from sparseml.pytorch.utils import GradSampler, PythonLogger
from torch import nn

restricted_eval = importlib.import_module("sparseml.utils.restricted_eval")  # a function of the package has its name

# Without a logger of ours SparseML writes sparse_logs/<date>.log into the current folder.
_QUIET = logging.getLogger("research.sparseml")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
logging.getLogger("sparseml").setLevel(os.environ.get("SPARSEML_LOG_LEVEL", "WARNING"))

LARGEST = 1_000_000
DEEPEST, MOST_KEYS, LARGEST_NUMBER = 30, 1_000, 1e18
MOST_VALUES = 100_000
"""Bytes of a recipe, and its values after each reference is replaced by what it refers to: references to references explode."""


def quiet_loggers() -> list[PythonLogger]:
    """What to hand to a manager as ``loggers``."""
    return [PythonLogger(logger=_QUIET)]


def load_manager(path: str) -> ScheduledModifierManager:
    """The manager of a recipe file.

    Raises:
        UserError: no such file, not YAML, an unknown modifier, arguments that a modifier does not take.
    """
    if not Path(path).is_file():
        raise UserError(f"--sparseml-recipe {path}: no such file; ready-made ones are in research/recipes")
    _check_harmless(path)
    try:
        manager = ScheduledModifierManager.from_yaml(_recipe_text(path))
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}: {error.problem}; pruning modifiers that exist: {', '.join(known_modifiers())}"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # whatever SparseML trips over, it is the recipe's
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(f"{path} does not load: {reason}") from error
    quantizing = [type(m).__name__ for m in manager.iter_modifiers() if "Quantization" in type(m).__name__]
    if quantizing:
        raise UserError(
            f"{path}: {quantizing[0]} does not work with torch {torch.__version__}: it fails when its epoch comes; take it out, and quantize the exported model"
        )
    return manager


def read(path: str | Path) -> str:
    """The text of a recipe, UTF-8 whatever the locale."""
    return Path(path).read_text(encoding="utf-8-sig")


def _recipe_text(path: str) -> str:
    """What to hand to SparseML in place of a path, which it would read in the locale's encoding. Line breaks tell it that this is no path.

    Raises:
        UserError: neither .yaml nor .md, or a .md without YAML in front.
    """
    text, suffix = read(path), Path(path).suffix.lower()
    if suffix not in (".yaml", ".md"):
        raise UserError(f"{path}: recipes are .yaml, or .md with YAML in front")
    if suffix == ".yaml":
        text = re.sub(r"^---(?=\s|$)", "", text, flags=re.MULTILINE)  # else it would look for a Markdown front
    elif not re.search(r"^\s*(---|\+\+\+).*?(---|\+\+\+)", text, flags=re.DOTALL | re.MULTILINE):
        raise UserError(f"{path} has no YAML in front, between two lines of ---")
    return f"\n{text}\n"


def _expanded_size(text: str) -> float:
    """Number of values of a YAML document when each reference is replaced by what it refers to; infinite for one that contains itself."""
    sizes: dict[str, float] = {}
    nested: list[tuple[str | None, float]] = [(None, 0)]
    with suppress(yaml.YAMLError):  # SparseML will say what is wrong with it, or take the front of a .md
        for event in yaml.parse(text):
            if isinstance(event, yaml.CollectionStartEvent):
                nested.append((event.anchor, 1))
                if event.anchor:
                    sizes[event.anchor] = math.inf
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, size = nested.pop()
            elif isinstance(event, yaml.AliasEvent):
                anchor, size = None, sizes.get(str(event.anchor), 1)
            elif isinstance(event, yaml.ScalarEvent):
                anchor, size = event.anchor, 1
            else:
                continue
            if anchor:
                sizes[anchor] = size
            nested[-1] = (nested[-1][0], nested[-1][1] + size)
    return sum(size for _, size in nested)


def _check_harmless(path: str) -> None:
    """A recipe of a few lines can keep a machine busy for ever: by powers (SparseML calculates), and by references to references.

    Raises:
        UserError: so it does, or it is no text.
    """
    if Path(path).stat().st_size > LARGEST:
        raise UserError(f"{path} has more than {LARGEST:,} bytes; that is no recipe")
    try:
        text = read(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is no text ({error.reason} at byte {error.start})") from error
    _check_size(path, text)
    if _expanded_size(text) > MOST_VALUES:
        raise UserError(
            f"{path}: its references (*name) make it more than {MOST_VALUES:,} values, or refer to themselves; write fewer"
        )


def _check_size(path: str, text: str) -> None:
    """YAML readers take quadratic time or more for these.

    Raises:
        UserError: the recipe is nested too deeply, or has too many keys or values.
    """
    depth = keys = 0
    for count, token in enumerate(_tokens(text)):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        keys += isinstance(token, yaml.KeyToken)
        if depth > DEEPEST:
            raise UserError(f"{path} nests more than {DEEPEST} levels deep; that is no recipe")
        if keys > MOST_KEYS or count > 20 * MOST_KEYS:
            raise UserError(
                f"{path} has more than {MOST_KEYS:,} keys or {20 * MOST_KEYS:,} YAML tokens; that is no recipe"
            )


_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def _bounded(calculate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operation whose result has to be small: a few products of products would fill any memory."""

    def bounded(a: Any, b: Any) -> Any:
        result = calculate(a, b)
        if abs(result) > LARGEST_NUMBER:
            raise ValueError(f"a result is larger than {LARGEST_NUMBER:g}")
        return result

    return bounded


def _power(a: Any, b: Any) -> Any:
    raise ValueError("** is not calculated here, since its result can be too large for any machine; write the number")


# What SparseML calculates in eval(...), however the recipe spells it.
_OPERATIONS = restricted_eval._VALID_BINOPS_TO_EVAL
_OPERATIONS.update({operator: _bounded(calculate) for operator, calculate in _OPERATIONS.items()})
_OPERATIONS[ast.Pow] = _power


def _tokens(text: str) -> Iterator[Any]:
    with suppress(yaml.YAMLError):  # SparseML will say what is wrong with it, or take the front of a .md
        yield from yaml.scan(text)


def known_modifiers() -> list[str]:
    """Names of the pruning modifiers that recipes can use here."""
    found, todo = set(), [BasePruningModifier]
    while todo:
        for child in todo.pop().__subclasses__():
            todo.append(child)
            if not child.__abstractmethods__ and not child.__name__.startswith(("Base", "_", "CorrelationAware")):
                found.add(child.__name__)
    return sorted(found)


def pruning_modifier(manager: ScheduledModifierManager, path: str) -> Any:
    """The one pruning modifier of a recipe, staged or not."""
    found = [modifier for modifier in manager.iter_modifiers() if isinstance(modifier, BasePruningModifier)]
    if len(found) != 1:
        names = ", ".join(type(m).__name__ for m in found) or "none"
        raise UserError(
            f"{path}: one-shot pruning takes a recipe with exactly one pruning modifier, this one has {names}"
        )
    return found[0]


def keep_inside(modifier: Any, folder: Path) -> None:
    """Let a recipe's ``traces_backup_dir`` lie in ``folder``, the experiment's: a recipe is data, and writes nowhere else.

    Raises:
        UserError: it leads out of it.
    """
    named = getattr(modifier, "traces_backup_dir", None)
    if not isinstance(modifier, CorrelationAwareModifier) or not named:
        return
    place = (folder / named).resolve()
    if Path(named).is_absolute() or folder.resolve() not in place.parents:
        raise UserError(
            f"traces_backup_dir: {named} leads out of the experiment's folder; a recipe names a folder inside it (state, say); the one-shot script's "
            "--state-dir may lie anywhere"
        )
    modifier._traces_backup_dir = str(place)


def check_sparsities(modifier: Any, model: nn.Module, sparsities: Sequence[float], path: str) -> None:
    """Can this recipe prune this model to these sparsities?

    Raises:
        UserError: the recipe gives each layer a sparsity of its own, or the model is sparser already than what is asked for.
    """
    if getattr(modifier, "final_sparsity", None) is None:
        raise UserError(
            f"{path}: {type(modifier).__name__} has no final_sparsity, so it cannot prune in one shot; it acts in a training, "
            "research/sparse_training.py. One-shot pruning takes CAPruningModifier, OBSPruningModifier or GlobalMagnitudePruningModifier, for example"
        )
    if isinstance(modifier.final_sparsity, dict) and (sparsities or not isinstance(modifier, CorrelationAwareModifier)):
        raise UserError(
            f"{path}: final_sparsity is a dict, one sparsity per layer, so --sparsities cannot replace it; "
            "leave --sparsities out (CAP, FastCAP), or write one number into the recipe"
        )
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in selected_names(modifier, model)]
    zeros, total = sum(int((p == 0).sum()) for p in chosen), sum(p.numel() for p in chosen)
    low = [s for s in sparsities if round(s * total) < zeros]
    if low:
        raise UserError(
            f"--sparsities {' '.join(map(str, low))}: {zeros:,} of the {total:,} weights that {path} prunes are zero already "
            f"({zeros / total:.4f}), and pruned weights do not come back; ask for more"
        )


def apply_at(path: str, model: nn.Module, sparsity: float, grad_sampler: dict[str, Any]) -> None:
    """Apply a recipe in one shot, in place, with its pruning modifier's sparsity replaced."""
    manager = load_manager(path)
    modifier = pruning_modifier(manager, path)
    modifier.init_sparsity = sparsity
    modifier.final_sparsity = sparsity
    if isinstance(modifier, MFACPruningModifier):
        # In one shot SparseML prunes before it takes the grad_sampler, and then has no gradient.
        batches = grad_sampler["data_loader_builder"](modifier.grad_sampler_kwargs)
        modifier._grad_sampler = GradSampler(batches, grad_sampler["loss_function"])
    manager.apply(model, loggers=quiet_loggers(), finalize=True, grad_sampler=grad_sampler)


def check_patterns(manager: ScheduledModifierManager, model: nn.Module) -> None:
    """Can the names of this model be matched with the patterns of a recipe? SparseML's own modifiers do so without a limit of time.

    Raises:
        SelectionError: a pattern takes for ever.
    """
    for modifier in manager.iter_modifiers():
        params = getattr(modifier, "params", None)
        for entry in [params] if isinstance(params, str) else params or ():
            if isinstance(entry, str) and entry.startswith("re:"):
                check_time(entry, [name for name, _ in model.named_parameters()])


def selected_names(modifier: Any, model: nn.Module) -> list[str]:
    """Names of the parameters that a modifier prunes."""
    return [f"{p.layer_name}.{p.param_name}" for p in modifier._create_named_layers_and_params(model)]

"""One pruning update of a recipe: what is asked of :func:`capruner.prune`, for our own training recipes and for SparseML's modifiers alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from capruner.checkpoint import StateError, remove_state
from capruner.result import PruningResult

_LOGGER = logging.getLogger(__name__)


def next_sparsity(
    masks: Mapping[str, Tensor], targets: Mapping[str, float], globally: bool
) -> float | dict[float, list[str]] | None:
    """The sparsity to prune to, as :func:`capruner.prune` takes it; None where it is reached already.

    A group that is past its target keeps its masks: pruned weights never come back.

    Args:
        masks: True = remains.
        targets: of each parameter.
        globally: one target over all of them, the mean weighted by their sizes.
    """
    names = list(targets)
    wanted: dict[tuple[str, ...], float]
    if not globally:
        wanted = {(name,): s for name, s in targets.items()}
    elif len(set(targets.values())) == 1:  # their mean can miss it by a rounding error, and the count by one weight
        wanted = {tuple(names): targets[names[0]]}
    else:
        total = sum(masks[name].numel() for name in names)
        wanted = {tuple(names): sum(s * masks[name].numel() for name, s in targets.items()) / total}
    pruned = {group: sum(int((~masks[n]).sum()) for n in group) for group in wanted}
    size = {group: sum(masks[n].numel() for n in group) for group in wanted}
    if all(round(s * size[group]) <= pruned[group] for group, s in wanted.items()):
        if any(round(s * size[group]) < pruned[group] for group, s in wanted.items()):
            _LOGGER.info("the model is sparser than the target of this update; masks stay as they are")
        return None
    wanted = {group: max(s, pruned[group] / size[group]) for group, s in wanted.items()}
    if globally:
        return wanted[tuple(names)]
    found: dict[float, list[str]] = {}
    for (name,), s in wanted.items():
        found.setdefault(s, []).append(name)
    return found


def prune_resumably(prune: Callable[[], PruningResult], folder: str | Path | None) -> PruningResult:
    """``prune()``; again without the state in ``folder`` if that was saved with other weights, as when training resumes from an earlier checkpoint."""
    try:
        return prune()
    except StateError as error:
        if folder is None:
            raise
        _LOGGER.warning("this update is calibrated from the start: %s", error)
        remove_state(folder)
        return prune()

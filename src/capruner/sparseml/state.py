"""The state of a SparseML manager as data: what a training run needs to resume exactly.

SparseML's own ``manager.state_dict()`` holds only masks. After its ``load_state_dict`` masks are not enforced, the schedule restarts, so that the next step
prunes off schedule, and staged recipes raise. Here the place in the schedule is included, for SparseML's modifiers and ours.

    saved = manager_state(manager)                       # tensors and plain numbers: torch.load(..., weights_only=True) reads it
    manager.modify(model, optimizer, steps, epoch=3.0)   # in a new process, same recipe, weights of the checkpoint
    load_manager_state(manager, saved)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Plain = bool | int | float | None

# What initializing has set in this process is no part of the place in a schedule.
_OF_THIS_PROCESS = {"_initialized", "_loggers_initialized", "_initialize_epoch"}


def manager_state(manager: Any) -> dict[str, dict[str, Any]]:
    """The state of every modifier, of staged recipes too: masks (bool, True = stays), whether they are enforced, place in the schedule."""
    return {key: modifier_state(modifier) for key, modifier in _keyed(manager).items()}


def load_manager_state(manager: Any, state: dict[str, dict[str, Any]]) -> None:
    """Restore :func:`manager_state` in an initialized manager; raise ``ValueError`` if it is from another recipe or model."""
    modifiers = _keyed(manager)
    if modifiers.keys() != state.keys():
        ours, theirs = (sorted(key.split("-")[0].split(" ")[-1] for key in keys) for keys in (modifiers, state))
        raise ValueError(
            f"the state was saved with another recipe: it has {', '.join(theirs)}, this recipe has {', '.join(ours)}"
            f"{'; a parameter of a modifier has changed' if ours == theirs else ''}"
        )
    for key, modifier in modifiers.items():
        load_modifier_state(modifier, state[key])


def modifier_state(modifier: Any) -> dict[str, Any]:
    """``{"<layer>.<param>.sparsity_mask": bool tensor, ..., "enforced": bool, "schedule": plain values}``."""
    masks: Any = getattr(modifier, "module_masks", None)
    state: dict[str, Any] = {} if masks is None else {n: m != 0 for n, m in zip(masks.names, masks.param_masks)}
    return state | {
        "enforced": masks is not None and masks.enabled,
        "schedule": {name: value for name, value in vars(modifier).items() if _is_place(name, value)},
    }


def load_modifier_state(modifier: Any, state: dict[str, Any]) -> None:
    """Restore :func:`modifier_state` in an initialized modifier; enforced masks are applied. Raise ``ValueError`` if they do not fit."""
    masks: Any = getattr(modifier, "module_masks", None)
    names = [] if masks is None else masks.names
    saved: dict[str, Tensor] = {name: value for name, value in state.items() if name.endswith(".sparsity_mask")}
    if set(names) != set(saved):
        odd = sorted(set(names) ^ set(saved))
        raise ValueError(
            f"the state of {type(modifier).__name__} was saved for a different model: {', '.join(odd[:4])}"
        )
    for index, name in enumerate(names):
        mask = masks.param_masks[index]
        if saved[name].shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)} in the state, {tuple(mask.shape)} here")
        # Not set_param_masks: that tells the scorer, and SparseML's OBS scorer would want its Fisher matrix for it.
        masks.param_masks[index] = saved[name].to(mask)
    vars(modifier).update(state["schedule"])
    if masks is not None:
        masks.enabled = state["enforced"]
        masks.apply()


def _keyed(manager: Any) -> dict[str, Any]:
    return {f"{i} {modifier.identifier()}": modifier for i, modifier in enumerate(manager.iter_modifiers())}


def _is_place(name: str, value: Any) -> bool:
    if name in _OF_THIS_PROCESS or not name.startswith("_"):
        return False
    return isinstance(value, Plain) or (isinstance(value, list) and all(isinstance(v, Plain) for v in value))

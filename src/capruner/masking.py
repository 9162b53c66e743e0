"""Masks from the zeros of a checkpoint, held in anyone's training loop.

The parameters stay plain parameters: nothing is wrapped or renamed, so ``state_dict``, ``deepcopy``, moving averages, ``DistributedDataParallel`` and
``torch.compile`` never notice. What holds the zeros is a hook that torch runs after the step of every optimizer. It sees the weights after momentum, weight
decay and whatever else the optimizer does; a hook on gradients would not, and would run before or after data-parallel averaging as it pleases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from capruner.selection import select_parameters, unwrap


class MaskHandle:
    """Masks that are being held; made by :func:`mask_model`. A context manager: they are let go at the end of the block.

    They hold as long as the model lives, whether anybody keeps the handle or not.

    Attributes:
        masks: ``{name: bool tensor}``, True = stays.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        # Weak: a model that is no longer used elsewhere is not kept alive by its masks.
        self._by_parameter = WeakIdKeyDictionary({p: name for name, p in parameters.items()})
        by_parameter, own = self._by_parameter, self.masks

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p in by_parameter:
                        _hold(p, by_parameter[p], own)

        self._hook = register_optimizer_step_post_hook(after_step)
        finalize(model, self._hook.remove)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the masked parameters."""
        return sum(int((~m).sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def apply(self) -> None:
        """Zero now what is masked: for optimizers that are not ``torch.optim.Optimizer``, and after weights were loaded."""
        for p, name in list(self._by_parameter.items()):
            _hold(p, name, self.masks)

    def remove(self) -> None:
        """Let the masks go; the weights stay as they are. Doing it twice does no harm."""
        self._hook.remove()

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@torch.no_grad()
def _hold(parameter: Tensor, name: str, masks: dict[str, Tensor]) -> None:
    if masks[name].device != parameter.device:  # the model has moved since
        masks[name] = masks[name].to(parameter.device)
    parameter.masked_fill_(~masks[name], 0)


def mask_model(
    model: nn.Module,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Mapping[str, Tensor] | None = None,
) -> MaskHandle:
    """Keep what is pruned at zero while ``model`` is trained on, with any optimizer, made before or after.

    >>> handle = capruner.mask_model(model)      # one line before the training loop
    >>> ...                                      # any loop; weights that were exactly 0 are 0 after every optimizer.step()
    >>> handle.remove()                          # if ever

    A deep copy of the model is another model: call it again for a copy that is trained.

    Args:
        model: wrapped in ``DistributedDataParallel`` or not.
        params: as in :func:`capruner.prune`; of these, the ones that hold zeros.
        masks: ``{name: tensor}``, non-zero = stays, instead of the zeros; the weights are zeroed at once.

    Raises:
        ValueError: nothing to hold: no zero in any of the parameters; a mask that names no parameter or has another shape.
    """
    model = unwrap(model)
    if masks is None:
        parameters = {name: p for name, p in select_parameters(model, params).items() if bool((p == 0).any())}
        if not parameters:
            raise ValueError(
                "mask_model found no zeros in the selected weights: load a pruned checkpoint into the model first, or give `masks`"
            )
        held = {name: p.detach() != 0 for name, p in parameters.items()}
    else:
        parameters = select_parameters(model, list(masks))
        for name, p in parameters.items():
            if masks[name].shape != p.shape:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(masks[name].shape)}, the parameter {tuple(p.shape)}"
                )
        held = {name: (masks[name] != 0).to(p.device) for name, p in parameters.items()}
    handle = MaskHandle(model, parameters, held)
    handle.apply()
    return handle

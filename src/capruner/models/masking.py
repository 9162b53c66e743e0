"""Keep pruned weights at zero in any training loop.

Parameters remain plain parameters: nothing is wrapped or renamed, so ``state_dict``, ``deepcopy``, moving averages, ``DistributedDataParallel`` and
``torch.compile`` are not affected. Masks are applied by a hook that torch runs after the step of every optimizer. It sees the weights after momentum, weight
decay and everything else the optimizer does. A hook on gradients would not, and its order relative to data-parallel averaging is undefined.

A parameter is looked up by its name at each step, because ``load_state_dict(assign=True)``, ``module.weight = nn.Parameter(...)`` and some moves to another
device put a new one in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from capruner.models.selection import select_parameters
from capruner.models.wrappers import by_first_name, owner, unwrap
from capruner.rows import zero_share


class _Masks:
    """The masks of one model, which they reference weakly: masks do not keep a model alive."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model = ref(model)
        self.masks = dict(masks)
        self.last: dict[str, int] = {}  # id of the parameter that each mask was last applied to

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The masked parameters as they are now, none if the model is gone; raise ``ValueError`` if one was removed or reshaped."""
        model = self.model()
        for name in self.masks if model is not None else ():
            assert model is not None
            yield name, self._parameter(model, name)

    def _parameter(self, model: nn.Module, name: str) -> nn.Parameter:
        try:
            module, attribute = owner(model, name)
        except AttributeError:
            found = None
        else:
            found = module._parameters.get(attribute)
        if found is None:
            raise ValueError(
                f"the mask of {name} cannot be held: the model has no such parameter any more (replaced, or computed by a parametrization); "
                "remove() the handle, and mask the model again as it is now"
            )
        if found.shape != self.masks[name].shape:
            raise ValueError(
                f"the mask of {name} cannot be held: its shape is {tuple(self.masks[name].shape)}, and the parameter is {tuple(found.shape)} now"
            )
        return found

    @torch.no_grad()
    def hold(self, stepped: Iterable[int] | None = None) -> None:
        """Zero the masked weights of parameters with these ids and of new parameters; of all parameters if None."""
        ids = None if stepped is None else set(stepped)
        for name, p in self.parameters():
            if ids is not None and id(p) not in ids and self.last.get(name) == id(p):
                continue
            if self.masks[name].device != p.device:  # the model has been moved
                self.masks[name] = self.masks[name].to(p.device)
            p.masked_fill_(~self.masks[name], 0)
            self.last[name] = id(p)


_ACTIVE: dict[object, _Masks] = {}
"""The masks of all models, by a key of each."""


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hook that torch calls after the step of any optimizer."""
    for masks in list(_ACTIVE.values()):
        masks.hold(id(p) for group in optimizer.param_groups for p in group["params"])


@functools.cache
def _listen() -> None:
    """Register the one hook, for good.

    Hooks of single models would have to be removed when these are collected as garbage, which can be while torch iterates over the hooks.
    """
    register_optimizer_step_post_hook(_after_step)


class _AfterLoading:
    """Hook that torch calls after ``load_state_dict``. Its copies, in a copy of the model, do nothing."""

    def __init__(self, masks: _Masks | None = None) -> None:
        self.masks = masks

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        if self.masks is not None:
            self.masks.hold()

    def __reduce__(self) -> tuple[type[_AfterLoading], tuple[()]]:
        return _AfterLoading, ()


class MaskHandle:
    """Active masks, created by :func:`mask_model`. As a context manager it removes them at the end of the block.

    Masks are active as long as the model exists, even if the handle is discarded.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._masks, self._key = _Masks(model, masks), object()
        _listen()
        _ACTIVE[self._key] = self._masks
        finalize(model, _ACTIVE.pop, self._key, None)
        self._after_loading = model.register_load_state_dict_post_hook(_AfterLoading(self._masks))

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{name: bool tensor}``, True = keep."""
        return self._masks.masks

    @property
    def sparsity(self) -> float:
        """Share of zeros in the masked parameters, counted in the model as it is now.

        Raises:
            ValueError: the model no longer exists.
        """
        parameters = [p for _, p in self._masks.parameters()]
        if not parameters:
            raise ValueError("the model of this handle no longer exists, so it has no sparsity")
        return zero_share(parameters)

    def apply(self) -> None:
        """Zero the masked weights now: for optimizers that are not ``torch.optim.Optimizer``, and after writing weights by hand."""
        self._masks.hold()

    def remove(self) -> None:
        """Remove the masks; weights do not change. Calling it twice is harmless."""
        _ACTIVE.pop(self._key, None)
        self._after_loading.remove()

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def mask_model(
    model: nn.Module,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Mapping[str, Tensor] | None = None,
    *,
    exclude: str | Sequence[str] = (),
) -> MaskHandle:
    """Keep pruned weights at zero while ``model`` is trained, with any optimizer, constructed before or after.

    >>> handle = capruner.mask_model(model)      # one line before the training loop
    >>> ...                                      # any loop; weights that were exactly 0 are 0 after every step
    >>> handle.remove()                          # optional

    Masks also apply when weights are loaded into the model (``load_state_dict``, also with ``assign=True``) or parameters are replaced by others of the same
    name and shape. A deep copy of the model is another model: call ``mask_model`` again for a copy that is trained. A moving average of the weights
    (an EMA copy) keeps the zeros if it and the model had them from its start.

    Args:
        model: in any wrapper (``torch.compile``, ``DistributedDataParallel``) or none.
        params: as in :func:`capruner.prune`; only those with zeros are masked.
        masks: ``{name: tensor}``, non-zero = keep, instead of the zeros of the weights; masked weights are set to zero at once.
        exclude: names of parameters or modules, or ``re:`` patterns, that are not masked.

    Raises:
        ValueError: no selected parameter has zeros; a mask names no parameter or has another shape.
    """
    model = unwrap(model)
    if masks is None:
        chosen = select_parameters(model, params, exclude, trainable=False)
        parameters = {name: p for name, p in chosen.items() if bool((p == 0).any())}
        if not parameters:
            raise ValueError(
                "mask_model found no zeros in the selected weights: load a pruned checkpoint into the model first, or give `masks`"
            )
        held = {name: p.detach() != 0 for name, p in parameters.items()}
    else:
        parameters = select_parameters(model, list(masks), exclude, trainable=False)
        masks = by_first_name(model, masks, "masks")
        for name, p in parameters.items():
            if masks[name].shape != p.shape:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(masks[name].shape)}, the parameter {tuple(p.shape)}"
                )
        held = {name: (masks[name] != 0).to(p.device) for name, p in parameters.items()}
    handle = MaskHandle(model, held)
    handle.apply()
    return handle

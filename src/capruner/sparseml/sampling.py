"""SparseML's ``grad_sampler`` as an iterable of calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from capruner.batches import ModelInputs

LOSS_KEYS = ("loss_function", "loss_fn")  # SparseML 1.8's spelling, and that of the published CAP


class GradSamplerBatches:
    """Calls the builder anew for every pass, so that each calibration sees fresh data.

    Args:
        grad_sampler: ``{"data_loader_builder": f, "loss_function": g}``. ``f(kwargs)`` is called positionally, as SparseML does, and returns an
            iterator, or a callable that returns one, of ``([args], {kwargs}, target)``.
        kwargs: the recipe's ``grad_sampler_kwargs``.

    Raises:
        RuntimeError: a key is missing.
    """

    def __init__(self, grad_sampler: Mapping[str, Any] | None, kwargs: Mapping[str, Any] | None) -> None:
        given = grad_sampler or {}
        loss = next((given[key] for key in LOSS_KEYS if key in given), None)
        if "data_loader_builder" not in given or loss is None:
            raise RuntimeError(
                "this modifier needs gradients: pass grad_sampler={'data_loader_builder': f, 'loss_function': g} to the manager's modify() or "
                f"apply() (got {sorted(given) or 'none'}); f(kwargs) returns an iterator of ([args], {{kwargs}}, target)"
            )
        self._builder: Callable[..., Any] = given["data_loader_builder"]
        self._loss: Callable[[Any, Any], Tensor] = loss
        self._kwargs = dict(kwargs or {})

    def __iter__(self) -> Iterator[tuple[ModelInputs, Any]]:
        batches = self._builder(self._kwargs)
        if callable(batches):
            batches = batches()
        for args, keywords, target in batches:
            yield ModelInputs(tuple(args), dict(keywords)), target

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """SparseML's convention: of a tuple of outputs the first counts."""
        return self._loss(outputs[0] if isinstance(outputs, tuple) else outputs, target)

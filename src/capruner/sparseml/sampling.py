"""SparseML's ``grad_sampler`` as an iterable of calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sparseml.pytorch.utils import GradSampler
from torch import Tensor

from capruner.batches import ModelInputs, default_loss, describe

LOSS_KEYS = ("loss_function", "loss_fn")  # SparseML 1.8's spelling, and that of the published CAP

EXPECTED = (
    "pass grad_sampler={'data_loader_builder': f, 'loss_function': g} to the manager's modify() or apply(), where f(kwargs) returns an iterable of "
    "([args], {kwargs}, target) or (inputs, targets); or a SparseML GradSampler, f alone, or a list of batches"
)


class GradSamplerBatches:
    """Batches of a ``grad_sampler``. A builder is called for every pass, so that each calibration sees fresh data.

    Args:
        grad_sampler: ``{"data_loader_builder": f, "loss_function": g}``; a SparseML ``GradSampler``; a builder ``f`` or an iterable of batches alone, with
            :func:`capruner.batches.default_loss`. ``f(kwargs)`` is called positionally, as SparseML does, or with keywords where it takes no positional
            argument. It returns an iterable, or a callable that returns one, of ``([args], {kwargs}, target)`` or of what :func:`capruner.prune` takes.
        kwargs: the recipe's ``grad_sampler_kwargs``.

    Raises:
        RuntimeError: anything else; a key is missing.
    """

    def __init__(self, grad_sampler: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self._kwargs = dict(kwargs or {})
        self._builder, self._loss = _builder_and_loss(grad_sampler, self._kwargs)

    def __iter__(self) -> Iterator[Any]:
        batches = self._builder()
        if callable(batches) and not isinstance(batches, Iterable):
            batches = batches()
        if not isinstance(batches, Iterable):
            raise RuntimeError(f"the grad_sampler's builder returned {describe(batches)}, not an iterable; {EXPECTED}")
        for item in batches:
            if not isinstance(item, tuple | list) or len(item) != 3:
                yield item
                continue
            args, keywords, target = item
            if not isinstance(keywords, Mapping):
                raise RuntimeError(
                    f"the grad_sampler gave {describe(item)}; expected ([args], {{kwargs}}, target) or (inputs, targets)"
                )
            yield ModelInputs(tuple(args) if isinstance(args, tuple | list) else (args,), dict(keywords)), target

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """SparseML's convention: of a tuple of outputs the first counts."""
        return self._loss(outputs[0] if isinstance(outputs, tuple) else outputs, target)


def _builder_and_loss(given: Any, kwargs: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, Any], Tensor]]:
    if isinstance(given, GradSampler):
        source = given._data_loader
        return (source if callable(source) else lambda: source), given._loss_fn
    if isinstance(given, Mapping):
        loss = next((given[key] for key in LOSS_KEYS if key in given), None)
        if "data_loader_builder" not in given or loss is None:
            raise RuntimeError(f"this modifier needs gradients: {EXPECTED} (got {sorted(map(str, given)) or 'none'})")
        if not callable(loss):
            raise RuntimeError(f"the grad_sampler's loss function is {describe(loss)}, not a function; {EXPECTED}")
        given = given["data_loader_builder"]
    else:
        loss = default_loss
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | type):
        return (lambda: given), loss
    if callable(given):
        return (lambda: _call(given, kwargs)), loss
    raise RuntimeError(
        f"this modifier needs gradients: {EXPECTED} (got {'none' if given is None else describe(given)})"
    )


def _call(builder: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """``builder(kwargs)``; ``builder(**kwargs)`` where it takes no positional argument."""
    try:
        inspect.signature(builder).bind(kwargs)
    except TypeError:
        return builder(**kwargs)
    except ValueError:  # a builtin without a signature
        pass
    return builder(kwargs)

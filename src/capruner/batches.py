"""Batches of any supported form as ``(inputs, targets)``, and calls of the model and the loss with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

_LOGGER = logging.getLogger(__name__)

BatchFunction = Callable[[Any], tuple[Any, Any]]


class BatchError(ValueError):
    """An invalid batch, or one on which the model or the loss fails. The message names the batch and the remedy."""


class ModelInputs(NamedTuple):
    """Inputs for a model that takes positional arguments and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``; tuples and lists are spread, mappings are keywords."""
    if isinstance(inputs, ModelInputs):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def as_batch(batch: Any, index: int, batch_fn: BatchFunction | None = None) -> tuple[Any, Any]:
    """``(inputs, targets)`` of batch number ``index``.

    A pair is returned unchanged. A mapping (a dict, ``BatchEncoding``, ``BatchFeature``) is both keyword inputs and what the loss is computed from. A tensor,
    or a tuple with one entry, is inputs without targets.

    Args:
        batch_fn: turns a batch of any other kind into a pair; called with every batch.

    Raises:
        BatchError: any other kind without ``batch_fn``; or ``batch_fn`` fails.
    """
    if batch_fn is not None:
        try:
            pair = batch_fn(batch)
        except Exception as error:
            raise BatchError(f"batch_fn fails on batch {index}, {describe(batch)}: {_reason(error)}") from error
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise BatchError(
                f"batch_fn must return (inputs, targets); it returned {describe(pair)} for batch {index}, {describe(batch)}"
            )
        return plain(pair[0]), plain(pair[1])
    if isinstance(batch, Mapping):
        inputs = plain(batch)
        return inputs, inputs
    if isinstance(batch, Tensor | ModelInputs):
        return batch, None
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch) in (1, 2):
        inputs, targets = (batch[0], None) if len(batch) == 1 else batch
        return plain(inputs), plain(targets)
    raise BatchError(
        f"batch {index} is {describe(batch)}, which is neither (inputs, targets) nor a mapping of keyword inputs: pass batch_fn, a function that turns a batch "
        "into (inputs, targets), such as lambda batch: (batch[0], batch[1])"
    )


def plain(value: Any) -> Any:
    """Convert nested mappings to dicts, so that tensors in them can be moved and sliced."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain, value))
    if isinstance(value, tuple | list):
        return [*map(plain, value)] if isinstance(value, list) else tuple(map(plain, value))
    return value


def own_copy(value: Any, device: torch.device) -> Any:
    """Copy ``value`` with its tensors to the device; a model may change its inputs in place."""

    def copy(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved is tensor else moved

    with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in a backward pass
        return tree_map_only(Tensor, copy, value)


@dataclass
class Batches:
    """The calibration data. Iterating repeats ``source`` without end, unless it is an iterator.

    Attributes:
        source: any iterable.
        batch_fn: see :func:`as_batch`.
    """

    source: Iterable[Any]
    batch_fn: BatchFunction | None = None
    _warned: bool = False

    @property
    def once(self) -> bool:
        """Whether the data can be read only once."""
        return isinstance(self.source, Iterator)

    def __iter__(self) -> Iterator[Any]:
        drawn, before = 0, -1
        while drawn > before:
            before = drawn
            for batch in self.source:
                if drawn == before > 0:
                    self._warn(drawn)
                drawn += 1
                yield batch
            if self.once:
                break

    @property
    def length(self) -> int | None:
        """Number of batches, if it is known."""
        try:
            return len(self.source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # also of a DataLoader over an IterableDataset
            return None

    def check_length(self, needed: int) -> None:
        """Warn if the data has fewer batches than needed; raise ``ValueError`` if it is an iterator."""
        length = self.length
        if length is not None and 0 < length < needed:
            if self.once:
                raise ValueError(
                    f"the calibration data is an iterator of {length} batches, and num_grads is {needed}: pass a DataLoader or a list, which can be "
                    f"started again, or num_grads={length}"
                )
            self._warn(length)

    def _warn(self, length: int) -> None:
        if not self._warned:
            _LOGGER.warning(
                "the calibration data ends after %d batches, fewer than num_grads needs, and is started again: gradients repeat, unless the loader shuffles "
                "or augments",
                length,
            )
        self._warned = True


def default_loss(outputs: Any, targets: Any) -> Tensor:
    """The output's own ``loss`` if the batch has no separate targets, else cross-entropy of the logits; ``BatchError`` if there are none."""
    if targets is None or isinstance(targets, Mapping):
        loss = _field(outputs, "loss")
        if isinstance(loss, Tensor):
            return loss
        if targets is None:
            raise BatchError(
                "the batch has no targets, and the model's output has no `loss`: give batches as (inputs, targets), pass labels='model' to draw labels from "
                "the model, or a loss_fn that ignores its second argument"
            )
        raise BatchError(
            "the batch is a mapping and the model's output has no `loss`: put the labels under the name that the model computes its loss from ('labels' "
            "in Hugging Face models), pass loss_fn(outputs, batch), or batch_fn to make (inputs, targets) of each batch"
        )
    logits = logits_of(outputs)
    if logits is None:
        raise BatchError(
            f"the model's output is {describe(outputs)}, and the default loss, cross_entropy, needs logits: {take(outputs)}"
        )
    return F.cross_entropy(logits, targets)


def take(outputs: Any) -> str:
    """Advice on a loss for outputs that are not a tensor."""
    first = repr(next(iter(outputs), "logits")) if isinstance(outputs, Mapping) else 0
    return f"pass a loss_fn that takes such outputs, for example lambda outputs, targets: cross_entropy(outputs[{first}], targets)"


def logits_of(outputs: Any) -> Tensor | None:
    """The outputs if they are a tensor, or their ``logits``; None if there are none."""
    found = outputs if isinstance(outputs, Tensor) else _field(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


@contextmanager
def failing(what: str, index: int, hint: str = "", **parts: Any) -> Iterator[None]:
    """Turn any error of the model or the loss into one that names and describes the batch.

    Args:
        what: for example "the model".
        hint: what to do.
        parts: what to describe, by name.
    """
    try:
        yield
    except (BatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shown = "; ".join(f"{name}: {describe(part)}" for name, part in parts.items())
        advice = f" ({hint})" if hint else ""
        raise BatchError(f"{what} fails on batch {index} ({shown}): {_reason(error)}{advice}") from error


def _reason(error: Exception) -> str:
    """The first line of the message; the traceback of the cause has the others."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def describe(value: Any) -> str:
    """Type and shape, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        parts = [f"{key}: {describe(item)}" for key, item in list(value.items())[:6]]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(parts)}{', ...' if len(value) > 6 else ''})"
    if isinstance(value, tuple | list):
        parts = [describe(item) for item in value[:4]]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(parts)}{', ...' if len(value) > 4 else ''})"
    return "None" if value is None else type(value).__name__


def batch_size(inputs: Any, index: int) -> int:
    """Number of samples in a batch, the length of the first tensor; ``BatchError`` if there is none."""
    sizes = [len(leaf) for leaf in tree_leaves(inputs) if is_batched(leaf)]
    if not sizes:
        raise BatchError(f"the inputs of batch {index} hold no tensor; they are {describe(inputs)}")
    return sizes[0]


def is_batched(leaf: Any) -> bool:
    """Whether a leaf of a batch has a row for each sample."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0

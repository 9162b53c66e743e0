"""Batches as people have them, turned into ``(inputs, targets)``; passes over the data; and what the model and the loss make of a batch."""

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
    """A batch that cannot be used, or that the model or the loss fails on. The message names the batch and says what to do."""


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

    A pair is taken as it is. A mapping (a dict, ``BatchEncoding``, ``BatchFeature``) is both: keyword inputs, and what the loss is computed from. A tensor,
    or a tuple of one entry, is inputs without targets.

    Args:
        batch_fn: turns a batch of any other kind into a pair; called with every batch.

    Raises:
        BatchError: any other kind, without ``batch_fn``; or ``batch_fn`` fails.
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
    """Mappings inside as dicts, so that tensors in them can be moved and sliced."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain, value))
    if isinstance(value, tuple | list):
        return [*map(plain, value)] if isinstance(value, list) else tuple(map(plain, value))
    return value


def own_copy(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on the device; never the user's own, which a model may change in place."""

    def copy(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved is tensor else moved

    with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in a backward pass
        return tree_map_only(Tensor, copy, value)


@dataclass
class Batches:
    """The user's data, as often as it is needed.

    Attributes:
        source: any iterable. Started again where it ends too early; an iterator cannot be.
        batch_fn: see :func:`as_batch`.
        draw_targets: makes targets from a batch's number and inputs, in the place of the data's.
        seen: called with the number of each batch that is drawn, skipped ones too, and the batch.
    """

    source: Iterable[Any]
    batch_fn: BatchFunction | None = None
    draw_targets: Callable[[int, Any], Any] | None = None
    seen: Callable[[int, Any], None] | None = None
    _said: bool = False

    @property
    def once(self) -> bool:
        """Whether there can be one pass only."""
        return isinstance(self.source, Iterator)

    def pair(self, batch: Any, index: int) -> tuple[Any, Any]:
        """``(inputs, targets)``."""
        inputs, targets = as_batch(batch, index, self.batch_fn)
        return inputs, targets if self.draw_targets is None else self.draw_targets(index, inputs)

    def check_length(self, needed: int) -> None:
        """Compare the number of batches, where it is known, with what is needed of them.

        Raises:
            ValueError: an iterator has too few.
        """
        try:
            length = len(self.source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # unknown; also of a DataLoader over an IterableDataset
            return
        if 0 < length < needed:
            if self.once:
                raise ValueError(
                    f"the calibration data is an iterator of {length} batches, and num_grads is {needed}: pass a DataLoader or a list, which can be "
                    f"started again, or num_grads={length}"
                )
            self._say(length)

    def stream(self, skip: int = 0) -> Iterator[Any]:
        """The batches as they come, after the first ``skip``; without end unless ``source`` is an iterator.

        Raises:
            ValueError: there are fewer than ``skip``.
        """
        drawn, before = 0, -1
        while drawn > before:
            before = drawn
            for batch in self.source:
                if drawn == before > 0:
                    self._say(drawn)
                if self.seen is not None:
                    self.seen(drawn, batch)
                drawn += 1
                if drawn > skip:
                    yield batch
            if self.once:
                break
        if drawn < skip:
            raise ValueError(f"the calibration data ended after {drawn} batches, where {skip} were drawn before")

    def pass_over(self, count: int) -> None:
        """Draw and drop ``count`` batches, as a pass of an earlier run did.

        Raises:
            ValueError: there are fewer.
        """
        stream = self.stream()
        for drawn in range(count):
            if next(stream, stream) is stream:
                raise ValueError(f"the calibration data ended after {drawn} batches, where {count} were drawn before")

    def _say(self, length: int) -> None:
        if not self._said:
            _LOGGER.warning(
                "the calibration data ends after %d batches, fewer than num_grads needs, and is started again: gradients repeat, unless the loader shuffles "
                "or augments",
                length,
            )
        self._said = True


def default_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss where none is given: the output's own ``loss`` for batches without targets apart from the inputs, else cross-entropy of the logits.

    Raises:
        BatchError: there is neither.
    """
    if targets is None or isinstance(targets, Mapping):
        loss = _field(outputs, "loss")
        if isinstance(loss, Tensor):
            return loss
        if targets is None:
            raise BatchError(
                "the batch has no targets, and the model's output no `loss`: give batches as (inputs, targets), pass labels='model' to draw labels from "
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
    """Advice on a loss for outputs that are no tensor."""
    first = repr(next(iter(outputs), "logits")) if isinstance(outputs, Mapping) else 0
    return f"pass a loss_fn that takes such outputs, for example lambda outputs, targets: cross_entropy(outputs[{first}], targets)"


def logits_of(outputs: Any) -> Tensor | None:
    """A tensor of outputs, or their ``logits``; None where there are none."""
    found = outputs if isinstance(outputs, Tensor) else _field(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


@contextmanager
def failing(what: str, index: int, hint: str = "", **parts: Any) -> Iterator[None]:
    """Turn any error of the model or the loss into one that names the batch and what is in it.

    Args:
        what: "the model", for example.
        hint: what to do.
        parts: by name, what to describe.
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
    """The first line; the traceback of the cause has the others."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def describe(value: Any) -> str:
    """Kind and shape, in a few words."""
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
    """Samples in a batch: the length of the first tensor.

    Raises:
        BatchError: there is no tensor.
    """
    sizes = [len(leaf) for leaf in tree_leaves(inputs) if is_batched(leaf)]
    if not sizes:
        raise BatchError(f"the inputs of batch {index} hold no tensor; they are {describe(inputs)}")
    return sizes[0]


def is_batched(leaf: Any) -> bool:
    """Whether a leaf of a batch has a row for each sample."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0

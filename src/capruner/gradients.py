"""Gradients out of a model and a loader, in slabs of ``k``, leaving no trace on the model.

``batch``
    One gradient is the mean over one batch, as in the published recipes: ``m`` gradients cost ``m`` batches.
``sample``
    One gradient per sample, by ``torch.func.vmap``: ``m`` gradients cost ``m`` samples.

``torch.autograd.grad`` and ``torch.func.grad`` never touch ``.grad``, so the training gradient of an update step survives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from capruner.finite import BadBatchError, check_loss, checked, floats
from capruner.memory import halved
from capruner.numerics import working_dtype
from capruner.wrappers import own_names

GradientMode = Literal["batch", "sample"]
OnBadBatch = Literal["raise", "skip"]
LossFunction = Callable[[Any, Any], Tensor]

FEW_BATCHES = 16
"""So many batches have to be drawn before a majority of bad ones ends the run: a loader without end would skip for ever."""


@dataclass
class Position:
    """How far the drawing of gradients has come; brought up to date before each slab.

    Attributes:
        taken: gradients that came out.
        batches: batches drawn, bad ones included.
        samples: ``sample`` mode: samples of the last batch that are used up.
        skipped: numbers of the batches that were left out, in whole or in part, for NaN or Inf.
        last: the last batch drawn, if it is to be kept for a checksum.
        checked: what ``last`` has to pass after the batches up to it were passed over; raises ``ValueError``.
    """

    taken: int = 0
    batches: int = 0
    samples: int = 0
    skipped: list[int] = field(default_factory=list)
    last: Any = None
    keep_last: bool = False
    checked: Callable[[Any], None] | None = None


class ModelInputs(NamedTuple):
    """Inputs for a model that takes positional arguments and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def gradient_slabs(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    num_grads: int,
    *,
    mode: GradientMode = "batch",
    slab: int = 16,
    on_bad_batch: OnBadBatch = "raise",
    position: Position | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Yield ``{name: (k, *shape)}`` slabs, ``k ≤ slab``, ``num_grads`` gradients in all; float32 (float64 for float64 parameters).

    The tensors of a slab are only valid until the next one is asked for. Use inside :func:`capruner.modes.eval_mode`.

    Args:
        model: called as ``model(inputs)``; a tuple or list of inputs is spread, a dict goes in as keywords.
        batches: ``(inputs, targets)`` pairs, moved to the model's device.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar: the mean over the batch.
        parameters: what to differentiate by.
        num_grads: batches (``mode="batch"``) or samples (``mode="sample"``) to draw.
        on_bad_batch: ``"raise"``, or ``"skip"``: a batch (``mode="sample"``: the sample) with NaN or Inf is left out and another one drawn.
        position: where to begin, if not at the start; tells after each slab how far the drawing has come.

    Raises:
        ValueError: the loader is empty or ends early; a parameter does not take part in the loss.
        BadBatchError: data, a loss or a gradient is NaN or Inf (with the batch and parameter); with ``on_bad_batch="skip"``: most batches are bad.
    """
    if mode not in get_args(GradientMode):
        raise ValueError(f"gradients must be one of {get_args(GradientMode)}, got {mode!r}")
    if num_grads < 1:
        raise ValueError(f"num_grads must be at least 1, got {num_grads}")
    if on_bad_batch not in get_args(OnBadBatch):
        raise ValueError(f"on_bad_batch must be one of {get_args(OnBadBatch)}, got {on_bad_batch!r}")
    device = next(iter(parameters.values())).device
    at = Position() if position is None else position
    drawn = _drawn(batches, device, at)
    source = _BatchGradients if mode == "batch" else _SampleGradients
    with tqdm(
        total=num_grads,
        initial=at.taken,
        desc="gradients",
        unit=mode,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for slab_gradients in source(model, drawn, loss_fn, parameters, num_grads, slab, on_bad_batch, at):
            bar.update(at.taken - bar.n)
            yield slab_gradients
    if at.taken < num_grads:
        unit = "batches" if mode == "batch" else "samples"
        hint = "" if mode == "sample" else ", or gradients='sample' to draw one gradient from each sample"
        bad = f" ({len(at.skipped)} bad batches were skipped)" if at.skipped else ""
        raise ValueError(
            f"the calibration data ended after {at.taken} {unit}{bad}, but num_grads is {num_grads}: give more data, or "
            f"num_grads={max(at.taken, 1)}{hint}"
            if at.batches
            else "the calibration data is empty: not one batch came out of it"
        )


def _drawn(batches: Iterable[Any], device: torch.device, at: Position) -> Iterator[tuple[int, Any, Any]]:
    """``(number, inputs, targets)`` on the device. In the middle of a ``sample`` mode batch that batch comes again."""
    again, index = at.batches - 1, -1
    for index, batch in enumerate(passing_over(batches, max(again, 0)), start=max(again, 0)):
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise ValueError(
                f"batch {index} is not an (inputs, targets) pair but {type(batch).__name__}"
                f"{f' of length {len(batch)}' if isinstance(batch, Sequence) else ''}"
            )
        if index == again and at.checked is not None:
            at.checked(batch)
        at.batches = index + 1
        if at.keep_last:
            at.last = batch
        if index == again and not at.samples:
            continue
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), tuple(batch))
        yield index, inputs, targets
    if again > index:
        raise ValueError(f"the calibration data ended after {again} batches, where {again + 1} were drawn before")


def passing_over(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The batches after the first ``count``, which are drawn and dropped; not even loaded where ``batches`` has a method ``pass_over(count)``.

    Raises:
        ValueError: there are fewer.
    """
    spared = getattr(batches, "pass_over", None)
    stream = iter(batches) if spared is None or not count else spared(count)
    if spared is None:
        for index in range(count):
            if next(stream, stream) is stream:
                raise ValueError(f"the calibration data ended after {index} batches, where {count} were drawn before")
    return stream


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``; tuples and lists are spread, dicts are keywords."""
    if isinstance(inputs, ModelInputs):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@dataclass
class _Source:
    """Iterable of slabs; what both modes share."""

    model: nn.Module
    batches: Iterator[tuple[int, Any, Any]]
    loss_fn: LossFunction
    parameters: Mapping[str, nn.Parameter]
    num_grads: int
    slab: int
    on_bad_batch: OnBadBatch
    at: Position

    def bad(self, index: int, error: BadBatchError) -> None:
        """Count a bad batch, or stop at it."""
        if self.on_bad_batch == "raise":
            raise error
        if index not in self.at.skipped[-1:]:
            self.at.skipped.append(index)
        if self.at.batches >= FEW_BATCHES and 2 * len(self.at.skipped) > self.at.batches:
            raise BadBatchError(
                f"{len(self.at.skipped)} of the first {self.at.batches} batches are bad, too many to skip; the last one: {error}"
            )


class _BatchGradients(_Source):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        at, slab = self.at, min(self.slab, self.num_grads)
        rows = {
            name: torch.empty(slab, *p.shape, dtype=working_dtype(p), device=p.device)
            for name, p in self.parameters.items()
        }
        filled: list[int] = []  # the batch of each row
        while at.taken + len(filled) < self.num_grads:
            item = next(self.batches, None)
            if item is None:
                break
            try:
                gradients = _gradients(self.model, *item, self.loss_fn, self.parameters)
                if self.on_bad_batch == "skip":  # before it is among good ones; otherwise a slab is checked in one go
                    checked(dict(zip(self.parameters, (g[None] for g in gradients))), item[:1])
            except BadBatchError as error:
                self.bad(item[0], error)
                continue
            for row, gradient in zip(rows.values(), gradients):
                row[len(filled)].copy_(gradient)
            filled.append(item[0])
            if len(filled) == slab:
                at.taken += slab
                yield checked(rows, filled)
                filled = []
        if filled:
            at.taken += len(filled)
            yield checked({name: row[: len(filled)] for name, row in rows.items()}, filled)


def _gradients(
    model: nn.Module,
    index: int,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
) -> Sequence[Tensor]:
    with torch.enable_grad(), _saying_which(index, inputs, targets):
        loss = _scalar(loss_fn(call_model(model, inputs), targets))
        check_loss(loss, index, inputs, targets)
        wanted = list(parameters.values())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
    for name, gradient in zip_longest(parameters, gradients):
        if gradient is None:
            raise ValueError(
                f"parameter {name} takes no part in the loss, so it has no gradient; leave it out of `params`"
            )
    return gradients


class _SampleGradients(_Source):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        at, parameters = self.at, self.parameters
        per_sample = torch.func.vmap(
            torch.func.grad(self._sample_loss(), has_aux=True), in_dims=(None, 0, 0), randomness="different"
        )
        tried = False
        while at.taken < self.num_grads:
            item = next(self.batches, None)
            if item is None:
                return
            index, inputs, targets = item
            size = _batch_size(inputs, index)
            if not tried:  # vmap gives zeros, and no error, to a parameter that takes no part
                x, y = tree_map_only(Tensor, operator.itemgetter(slice(0, 1)), (inputs, targets))
                try:
                    _gradients(self.model, index, x, y, self.loss_fn, parameters)
                    tried = True
                except BadBatchError:  # found again below
                    pass
            start = at.samples  # not 0 in the batch in whose midst an earlier run had stopped
            while start < size and at.taken < self.num_grads:
                stop = min(start + self.slab, size, start + self.num_grads - at.taken)
                part = tree_map_only(Tensor, operator.itemgetter(slice(start, stop)), (inputs, targets))
                try:
                    with (
                        sdpa_kernel(SDPBackend.MATH),
                        _saying_which(index, *part),
                    ):  # the fused attention kernels have no batching rule
                        gradients, losses = per_sample({n: p.detach() for n, p in parameters.items()}, *part)
                except torch.OutOfMemoryError:
                    if stop - start == 1:
                        raise
                    gradients = None
                if gradients is None:  # outside of the handler, whose error holds the tensors of the attempt
                    self.slab = halved(stop - start, "gradients of samples")
                    continue
                slab = {n: g.to(working_dtype(g)) for n, g in gradients.items()}
                try:
                    check_loss(losses, index, *part)
                    checked(slab, [index] * (stop - start))
                except BadBatchError as error:
                    self.bad(index, error)
                    good = _good_samples(slab, losses, part)
                    slab = {n: g[good] for n, g in slab.items()}
                start = stop
                at.samples = stop
                found = len(next(iter(slab.values())))
                at.taken += found
                if found:
                    yield slab
            at.samples = 0

    def _sample_loss(self) -> Callable[[dict[str, Tensor], Any, Any], tuple[Tensor, Tensor]]:
        model = self.model
        pruned = {id(p) for p in self.parameters.values()}
        frozen = {n: p.detach() for n, p in model.named_parameters() if id(p) not in pruned}
        frozen |= {n: b for n, b in model.named_buffers()}

        def sample_loss(wanted: dict[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
            def functional(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(model, own_names(model, wanted) | frozen, args, kwargs)

            inputs, targets = tree_map_only(Tensor, lambda t: t.unsqueeze(0), (inputs, targets))
            loss = _scalar(self.loss_fn(call_model(functional, inputs), targets))
            return loss, loss.detach()

        return sample_loss


@contextmanager
def _saying_which(index: int, inputs: Any, targets: Any) -> Iterator[None]:
    """Errors of the model and the loss as ``ValueError``, with the batch and what is in it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        shown = (", ".join(map(_kind, tree_leaves(part)[:4])) or "nothing" for part in (inputs, targets))
        raise ValueError(
            "the model or the loss fails on batch {} (inputs: {}; targets: {}): {}".format(index, *shown, error)
        ) from error


def _kind(leaf: Any) -> str:
    return (
        f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
    )


def _good_samples(slab: Mapping[str, Tensor], losses: Tensor, part: Any) -> Tensor:
    """Bool per sample: everything about it is finite."""
    good = torch.isfinite(losses)
    for rows in (*slab.values(), *floats(part)):
        good &= torch.isfinite(rows).reshape(len(rows), -1).all(dim=1)
    return good


def _batch_size(inputs: Any, index: int) -> int:
    sizes: list[int] = []
    tree_map_only(Tensor, lambda t: sizes.append(len(t)), inputs)
    if not sizes:
        raise ValueError(f"the inputs of batch {index} hold no tensor")
    return sizes[0]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the mean over the batch, got {got}")
    return loss.reshape(())

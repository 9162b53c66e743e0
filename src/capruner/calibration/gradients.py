"""Gradients of a model on calibration data, in slabs of ``k``; the model is not changed.

``batch``
    One gradient is the mean over one batch, as in the published recipes: ``m`` gradients cost ``m`` batches.
``sample``
    One gradient per sample, by ``torch.func.vmap``: ``m`` gradients cost ``m`` samples.

``torch.autograd.grad`` and ``torch.func.grad`` never touch ``.grad``, so the training gradient of an update step survives.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from tqdm.auto import tqdm

from capruner.batches import BatchError, batch_size, call_model, describe, failing, is_batched, logits_of, plain, take
from capruner.calibration.finite import BadBatchError, check_loss, checked, floats
from capruner.calibration.stream import CalibrationStream
from capruner.core.memory import halved
from capruner.core.numerics import working_dtype
from capruner.models.computed import FirstLook
from capruner.models.wrappers import own_names

GradientMode = Literal["batch", "sample"]
OnBadBatch = Literal["raise", "skip"]
LossFunction = Callable[[Any, Any], Tensor]

VMAP = "gradients='sample' needs torch.func.vmap, which not every operation supports; gradients='batch' does not"
FEW_BATCHES = 16
"""After this many batches a majority of bad ones is an error: an endless loader would be skipped forever."""


def gradient_slabs(
    model: nn.Module,
    stream: CalibrationStream,
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    num_grads: int,
    *,
    stops: Sequence[int] = (),
    mode: GradientMode = "batch",
    slab: int = 16,
    on_bad_batch: OnBadBatch = "raise",
    progress: bool = True,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield ``{name: (k, *shape)}`` slabs, ``k ≤ slab``, ``num_grads`` gradients in all; float32 (float64 for float64 parameters).

    The tensors of a slab are valid until the next one is requested. Use inside :func:`capruner.models.modes.eval_mode`.

    Args:
        model: called as ``model(inputs)``; a tuple or list of inputs is unpacked, a mapping is passed as keywords.
        stream: the data; counts the gradients, so that a resumed stream yields the remaining ones.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar: the mean over the batch. For a batch that is a mapping, ``loss_fn(outputs, batch)``.
        parameters: what to differentiate with respect to.
        num_grads: batches (``mode="batch"``) or samples (``mode="sample"``) to draw.
        stops: ascending numbers of gradients after which a slab ends.
        on_bad_batch: ``"raise"``, or ``"skip"``: leave out a batch (``mode="sample"``: the sample) with NaN or Inf and draw another one.

    Raises:
        ValueError: the loader is empty, or an iterator that ends early.
        BatchError: an invalid batch; the model or the loss fails on one; a parameter does not take part in the loss.
        BadBatchError: data, a loss or a gradient is NaN or Inf (names the batch and parameter); with ``on_bad_batch="skip"``: most batches are bad.
    """
    if born := [name for name, p in parameters.items() if p.is_inference()]:
        raise ValueError(
            f"{born[0]} was made in torch.inference_mode(), so it cannot have a gradient: build or load the model outside of it"
        )
    if mode == "batch" and not stream.drawn:
        stream.batches.check_length(num_grads)
    first = FirstLook(model, parameters)
    source = _BatchGradients if mode == "batch" else _SampleGradients
    with tqdm(
        total=num_grads,
        initial=stream.taken,
        desc="gradients",
        unit=mode,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for slab_gradients in source(
            model, first, stream, loss_fn, parameters, (*stops, num_grads), slab, on_bad_batch
        ):
            bar.update(stream.taken - bar.n)
            yield slab_gradients
    if stream.taken < num_grads:
        raise ValueError(_too_few(stream, num_grads, mode))


def _too_few(stream: CalibrationStream, num_grads: int, mode: GradientMode) -> str:
    if not stream.drawn:
        return "the calibration data is empty: it yields no batch"
    unit = "batches" if mode == "batch" else "samples"
    bad = f" ({len(stream.skipped)} bad batches were skipped)" if stream.skipped else ""
    hint = "" if mode == "sample" else ", or gradients='sample' to draw one gradient from each sample"
    return (
        f"the calibration data ended after {stream.taken} {unit}{bad} and cannot be started again, but num_grads is {num_grads}: pass a DataLoader or a "
        f"list instead of an iterator, more data, or num_grads={max(stream.taken, 1)}{hint}"
    )


@dataclass
class _Source:
    """Iterable of slabs; the base of both modes."""

    model: nn.Module
    looking: FirstLook
    stream: CalibrationStream
    loss_fn: LossFunction
    parameters: Mapping[str, nn.Parameter]
    stops: Sequence[int]
    slab: int
    on_bad_batch: OnBadBatch

    def room(self) -> int:
        """Gradients that fit the next slab; 0 when all are drawn."""
        taken = self.stream.taken
        return min(self.slab, next((stop for stop in self.stops if stop > taken), taken) - taken)

    def bad(self, index: int, error: BadBatchError) -> None:
        """Note that a batch is skipped, or raise."""
        if self.on_bad_batch == "raise":
            raise error
        stream = self.stream
        if index not in stream.skipped[-1:]:
            stream.skipped.append(index)
        if stream.drawn >= FEW_BATCHES and 2 * len(stream.skipped) > stream.drawn:
            raise BadBatchError(
                f"{len(stream.skipped)} of the first {stream.drawn} batches are bad, too many to skip; the last one: {error}"
            )


class _BatchGradients(_Source):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        stream = self.stream
        rows = {
            name: torch.empty(min(self.slab, self.stops[-1]), *p.shape, dtype=working_dtype(p), device=p.device)
            for name, p in self.parameters.items()
        }
        filled: list[int] = []  # the batch of each row
        averaged = 0
        while self.room():
            item = next(stream, None)
            if item is None:
                break
            try:
                gradients = _gradients(self.looking, *item, self.loss_fn, self.parameters)
                # Before it is added to the slab; otherwise a whole slab is checked at once.
                if self.on_bad_batch == "skip":
                    checked(dict(zip(self.parameters, (g[None] for g in gradients))), item[:1])
            except BadBatchError as error:
                self.bad(item[0], error)
                continue
            for row, gradient in zip(rows.values(), gradients):
                row[len(filled)].copy_(gradient)
            filled.append(item[0])
            averaged += next((len(leaf) for leaf in tree_leaves(item[1]) if is_batched(leaf)), 1)
            if len(filled) == self.room():
                stream.taken += len(filled)
                stream.averaged += averaged
                yield checked({name: row[: len(filled)] for name, row in rows.items()}, filled)
                filled, averaged = [], 0
        if filled:
            stream.taken += len(filled)
            stream.averaged += averaged
            yield checked({name: row[: len(filled)] for name, row in rows.items()}, filled)


def _evaluate(
    model: Callable[..., Any], index: int, inputs: Any, targets: Any, loss_fn: LossFunction, advice: str = ""
) -> tuple[Any, Tensor]:
    """Outputs and loss. ``advice``: the hint if either fails."""
    hint = "pass batch_fn to choose what the model is called with" if isinstance(inputs, Mapping) else ""
    with failing("the model", index, advice or hint, inputs=inputs):
        outputs = call_model(model, inputs)
    hint = ""
    if targets is None:
        hint = "the batch has no targets: pass labels='model', or a loss_fn that ignores its second argument"
    elif not isinstance(outputs, Tensor):
        hint = take(outputs)
    with failing("the loss", index, advice or hint, outputs=outputs, targets=targets):
        loss = loss_fn(outputs, targets)
    return outputs, _scalar(loss)


def _gradients(
    model: Callable[..., Any],
    index: int,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
) -> Sequence[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        outputs, loss = _evaluate(model, index, inputs, targets, loss_fn)
        check_loss(loss, index, inputs, targets)
        if not loss.requires_grad:
            raise BatchError(_detached(index, outputs))
        with failing("the backward pass", index, inputs=inputs, targets=targets):
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    absent = [name for name, gradient in zip(parameters, gradients) if gradient is None]
    if absent:
        one = len(absent) == 1
        raise BatchError(
            f"{', '.join(absent)} {'takes' if one else 'take'} no part in the loss of batch {index}, so there is no gradient: leave "
            f"{'it' if one else 'them'} out of `params`, or use a loss that depends on {'it' if one else 'them'}"
        )
    return [g if g.layout == torch.strided else g.to_dense() for g in gradients]


def _detached(index: int, outputs: Any) -> str:
    tensors = [leaf for leaf in (*tree_leaves(plain(outputs)), logits_of(outputs)) if isinstance(leaf, Tensor)]
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        cause = "the model's outputs are detached from its parameters: its forward runs under torch.no_grad() or torch.inference_mode(), or detaches them"
    else:
        cause = "loss_fn detaches it, computes it under torch.no_grad(), or uses functions without a derivative (argmax, round, numpy)"
    return f"the loss of batch {index} does not depend on any parameter, so there are no gradients: {cause}"


class _SampleGradients(_Source):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        stream, parameters = self.stream, self.parameters
        tried = False
        while self.room():
            item = next(stream, None)
            if item is None:
                return
            index, inputs, targets = item
            size = batch_size(inputs, index)
            if not size:
                self.bad(index, BadBatchError(f"batch {index} is empty: its inputs are {describe(inputs)}"))
                continue
            if not tried:  # vmap returns zeros, and no error, for a parameter that takes no part
                try:
                    x, y = _rows(slice(0, 1), inputs, targets)
                    _gradients(self.looking, index, x, y, self.loss_fn, parameters)
                    tried = True
                except BadBatchError:  # raised again below
                    pass
            start = stream.used  # not 0 in the batch at which an interrupted run stopped
            while start < size and self.room():
                stop = min(start + self.room(), size)
                part = _rows(slice(start, stop), inputs, targets)
                try:
                    gradients, losses = self._per_sample(index, *part)
                except torch.OutOfMemoryError:
                    if stop - start == 1:
                        raise
                    gradients = None
                if gradients is None:  # outside of the handler: the error references the tensors of the attempt
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
                stream.used = stop
                found = len(next(iter(slab.values())))
                stream.taken += found
                stream.averaged += found
                if found:
                    yield slab
            stream.used = 0

    def _per_sample(self, index: int, inputs: Any, targets: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients and losses ``(k, ...)`` of each sample. Leaves that are scalars or not tensors are the same for all."""
        model = self.model
        pruned = {id(p) for p in self.parameters.values()}
        frozen = {n: p.detach() for n, p in model.named_parameters() if id(p) not in pruned}
        frozen |= {n: b for n, b in model.named_buffers()}
        leaves, structure = tree_flatten((inputs, targets))
        places = [place for place, leaf in enumerate(leaves) if is_batched(leaf)]

        def sample_loss(wanted: dict[str, Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
            def functional(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(model, own_names(model, wanted) | frozen, args, kwargs)

            whole = list(leaves)
            for place, row in zip(places, rows):
                whole[place] = row.unsqueeze(0)
            sample, target = tree_unflatten(whole, structure)
            loss = _evaluate(functional, index, sample, target, self.loss_fn, VMAP)[1]
            return loss, loss.detach()

        per_sample = torch.func.vmap(
            torch.func.grad(sample_loss, has_aux=True), in_dims=(None, 0), randomness="different"
        )
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _dense_embeddings(model),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no batching rule
            failing("the gradient of each sample", index, VMAP, inputs=inputs, targets=targets),
        ):
            found: tuple[dict[str, Tensor], Tensor] = per_sample(
                {n: p.detach() for n, p in self.parameters.items()}, [leaves[place] for place in places]
            )
        return found


@contextmanager
def _dense_embeddings(model: nn.Module) -> Iterator[None]:
    """Dense gradients for embeddings with ``sparse=True``: vmap does not support sparse ones. The values are the same."""
    sparse = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    try:
        for module in sparse:
            module.sparse = False
        yield
    finally:
        for module in sparse:
            module.sparse = True


def _rows(rows: slice, *parts: Any) -> tuple[Any, ...]:
    """Copy the rows of some samples; a model may change its inputs in place."""
    with torch.inference_mode(False):  # as in own_copy()
        return tuple(tree_map_only(Tensor, lambda t: t[rows].clone() if t.dim() else t.clone(), part) for part in parts)


def _good_samples(slab: Mapping[str, Tensor], losses: Tensor, part: Any) -> Tensor:
    """Bool per sample: its inputs, loss and gradients are finite."""
    good = torch.isfinite(losses)
    for rows in (*slab.values(), *floats(part)):
        if not rows.dim():
            good &= bool(torch.isfinite(rows))
            continue
        good &= torch.isfinite(rows).reshape(len(rows), -1).all(dim=1)
    return good


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        got = type(loss).__name__ if not isinstance(loss, Tensor) else f"shape {tuple(loss.shape)}"
        if isinstance(loss, Tensor) and loss.is_complex():
            got = describe(loss)
        raise BatchError(f"loss_fn must return a scalar tensor, the mean over the batch, got {got}")
    return loss.reshape(())

"""Gradients out of a model and a loader, in slabs of ``k``, leaving no trace on the model.

``batch``
    One gradient is the mean over one batch, as in the published recipes: ``m`` gradients cost ``m`` batches.
``sample``
    One gradient per sample, by ``torch.func.vmap``: ``m`` gradients cost ``m`` samples.

``torch.autograd.grad`` and ``torch.func.grad`` never touch ``.grad``, so the training gradient of an update step survives.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

GradientMode = Literal["batch", "sample"]
LossFunction = Callable[[Any, Any], Tensor]


class ModelInputs(NamedTuple):
    """Inputs for a model that takes positional arguments and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards, also after an exception, every module's mode and every buffer (BatchNorm statistics) is as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


def gradient_slabs(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    num_grads: int,
    *,
    mode: GradientMode = "batch",
    slab: int = 16,
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Yield ``{name: (k, *shape)}`` slabs, ``k ≤ slab``, ``num_grads`` gradients in all; float32 (float64 for float64 parameters).

    The tensors of a slab are only valid until the next one is asked for. Use inside :func:`calibrating`.

    Args:
        model: called as ``model(inputs)``; a tuple or list of inputs is spread, a dict goes in as keywords.
        batches: ``(inputs, targets)`` pairs, moved to the model's device.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar: the mean over the batch.
        parameters: what to differentiate by.
        num_grads: batches (``mode="batch"``) or samples (``mode="sample"``) to draw.

    Raises:
        ValueError: the loader is empty or ends early; a loss or a gradient is NaN or Inf (with the batch and parameter); a parameter does not
            take part in the loss.
    """
    if mode not in get_args(GradientMode):
        raise ValueError(f"gradients must be one of {get_args(GradientMode)}, got {mode!r}")
    if num_grads < 1:
        raise ValueError(f"num_grads must be at least 1, got {num_grads}")
    device = next(iter(parameters.values())).device
    with tqdm(total=num_grads, desc="gradients", unit=mode, disable=None if progress else True, leave=False) as bar:
        done = 0
        source = _batch_gradients if mode == "batch" else _sample_gradients
        for slab_gradients in source(model, _drawn(batches, device), loss_fn, parameters, num_grads, slab):
            done += len(next(iter(slab_gradients.values())))
            bar.update(done - bar.n)
            yield slab_gradients
    if done < num_grads:
        unit = "batches" if mode == "batch" else "samples"
        hint = "" if mode == "sample" else ", or gradients='sample' to draw one gradient from each sample"
        raise ValueError(
            f"the calibration data ended after {done} {unit}, but num_grads is {num_grads}: give more data, or num_grads={max(done, 1)}{hint}"
            if done
            else "the calibration data is empty: not one batch came out of it"
        )


def _drawn(batches: Iterable[Any], device: torch.device) -> Iterator[tuple[int, Any, Any]]:
    for index, batch in enumerate(batches):
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise ValueError(
                f"batch {index} is not an (inputs, targets) pair but {type(batch).__name__}"
                f"{f' of length {len(batch)}' if isinstance(batch, Sequence) else ''}"
            )
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), tuple(batch))
        yield index, inputs, targets


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``; tuples and lists are spread, dicts are keywords."""
    if isinstance(inputs, ModelInputs):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def _accumulation_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _batch_gradients(
    model: nn.Module,
    batches: Iterator[tuple[int, Any, Any]],
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    num_grads: int,
    slab: int,
) -> Iterator[dict[str, Tensor]]:
    slab = min(slab, num_grads)
    rows = {
        name: torch.empty(slab, *p.shape, dtype=_accumulation_dtype(p), device=p.device)
        for name, p in parameters.items()
    }
    filled = taken = 0
    while taken < num_grads:
        item = next(batches, None)
        if item is None:
            break
        for row, gradient in zip(rows.values(), _gradients(model, *item, loss_fn, parameters)):
            row[filled].copy_(gradient)
        taken += 1
        filled += 1
        if filled == slab:
            yield _checked(rows, range(taken - filled, taken))
            filled = 0
    if filled:
        yield _checked({name: row[:filled] for name, row in rows.items()}, range(taken - filled, taken))


def _gradients(
    model: nn.Module,
    index: int,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
) -> Sequence[Tensor]:
    with torch.enable_grad():
        loss = _scalar(loss_fn(call_model(model, inputs), targets))
        _check_loss(loss, index)
        wanted = list(parameters.values())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
    for name, gradient in zip_longest(parameters, gradients):
        if gradient is None:
            raise ValueError(
                f"parameter {name} takes no part in the loss, so it has no gradient; leave it out of `params`"
            )
    return gradients


def _sample_gradients(
    model: nn.Module,
    batches: Iterator[tuple[int, Any, Any]],
    loss_fn: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    num_grads: int,
    slab: int,
) -> Iterator[dict[str, Tensor]]:
    frozen = {n: p.detach() for n, p in model.named_parameters() if n not in parameters}
    frozen |= {n: b for n, b in model.named_buffers()}

    def sample_loss(wanted: dict[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        def functional(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, wanted | frozen, args, kwargs)

        inputs, targets = tree_map_only(Tensor, lambda t: t.unsqueeze(0), (inputs, targets))
        loss = _scalar(loss_fn(call_model(functional, inputs), targets))
        return loss, loss.detach()

    per_sample = torch.func.vmap(
        torch.func.grad(sample_loss, has_aux=True), in_dims=(None, 0, 0), randomness="different"
    )
    taken = 0
    while taken < num_grads:
        item = next(batches, None)
        if item is None:
            return
        index, inputs, targets = item
        size = _batch_size(inputs, index)
        if not taken:  # vmap gives zeros, and no error, to a parameter that takes no part
            one_input, one_target = tree_map_only(Tensor, operator.itemgetter(slice(0, 1)), (inputs, targets))
            _gradients(model, index, one_input, one_target, loss_fn, parameters)
        for start in range(0, min(size, num_grads - taken), slab):
            stop = min(start + slab, size, start + num_grads - taken)
            part = tree_map_only(Tensor, operator.itemgetter(slice(start, stop)), (inputs, targets))
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no batching rule
                gradients, losses = per_sample({n: p.detach() for n, p in parameters.items()}, *part)
            _check_loss(losses, index)
            slab_gradients = {n: g.to(_accumulation_dtype(g)) for n, g in gradients.items()}
            yield _checked(slab_gradients, [index] * (stop - start))
            taken += stop - start


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


def _check_loss(loss: Tensor, index: int) -> None:
    value = float(loss.detach().sum())
    if not math.isfinite(value):
        raise ValueError(f"the loss of batch {index} is {value}: look at that batch's data, or at the model's weights")


def _checked(slab: dict[str, Tensor], batches: Sequence[int]) -> dict[str, Tensor]:
    """``slab``, if its gradients are finite; ``batches`` says from which batch each of them is."""
    for name, rows in slab.items():
        if math.isfinite(float(rows.sum())):  # one pass: a sum of finite numbers is finite unless it overflows
            continue
        bad = (~torch.isfinite(rows)).reshape(len(rows), -1).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(
                f"the gradient of {name} holds NaN or Inf in batch {batches[int(bad[0])]}: look at the data, or at the model's weights"
            )
    return slab

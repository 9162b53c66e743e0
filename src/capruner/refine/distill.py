"""Distillation after pruning: train the weights that remain towards the outputs of the dense network, without labels.

CAP's Fisher blocks do not see each other: what the zeros of one layer do to the inputs of the next is in none of them. Distillation measures it. The loss
is the Kullback-Leibler divergence of the pruned network's class probabilities from those of the dense one, in nats, on a few thousand calibration samples.
Masks are fixed; all other parameters are trained by AdamW with a cosine schedule: remaining weights, biases, norms and layers that were not pruned.

The model is in eval mode meanwhile, so BatchNorm statistics are those of the dense network and do not change, and dropout is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from capruner.batches import BatchFunction, as_batch, failing
from capruner.calibration.gradients import LossFunction
from capruner.checks import check_count, check_masks, check_model, check_number
from capruner.distributed import Processes, processes
from capruner.models.modes import eval_mode, random_state_kept, weights_restored
from capruner.models.wrappers import by_first_name, unwrap
from capruner.refine.training import Distillation, Lesson, checked_logits, log_probabilities, train, trainable

SAMPLES = 4096
"""The first samples of the data, of all processes together, that are trained on; they are held in memory meanwhile."""


def distill(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    passes: float = 1.0,
    lr: float | None = None,
    samples: int = SAMPLES,
    masks: Mapping[str, Tensor] | None = None,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
) -> Distillation:
    """Train a pruned model, in place, towards the outputs of the dense one. Pruned weights stay exactly zero; labels are not used.

    Everything else that requires a gradient is trained, biases, norms and layers that were not pruned included. Both models are in eval mode meanwhile:
    BatchNorm statistics do not change, dropout is off. Modes, gradients (``.grad``) and random generators are afterwards what they were. With
    ``torch.distributed`` initialised each process gives its own batches, and all end with the same bytes.

    Args:
        model: pruned; its outputs are logits ``(batch, classes)``, or have them as ``.logits``.
        dense: the model before pruning; on the same device, with the same outputs.
        batches, batch_fn: as for :func:`capruner.prune`; targets are not looked at.
        passes: passes over the samples, also a fraction of one.
        lr: the learning rate of AdamW at the start; a cosine takes it to 0. None: chosen by a few trials of 32 steps.
        samples: number of samples, the first of ``batches``, of all processes together, are held in memory and trained on.
        masks: ``{parameter name: tensor}``, True or non-zero = keep. None: every weight of a parameter with two or more dimensions that is exactly 0 stays 0.
        progress: show a progress bar.

    Returns:
        The divergence before and after. If it did not fall the model is as it was, which a warning says.

    Raises:
        ValueError: invalid arguments, no batches, outputs that are not logits or differ in shape, a divergence that is not finite. The model is then
            as it was.
    """
    check_model(model)
    check_model(dense, "dense")
    model, dense = unwrap(model), unwrap(dense)
    if {id(p) for p in model.parameters()} & {id(p) for p in dense.parameters()}:
        raise ValueError(
            "model and dense share parameters: prune a copy, copy.deepcopy(model), and keep the dense model"
        )
    check_number("passes", passes)
    if lr is not None:
        check_number("lr", lr)
    check_count("samples", samples)
    trained = trainable(model)
    masks = zeros_of(trained) if masks is None else _of(trained, by_first_name(model, masks, "masks"))
    everybody = processes()
    with everybody.together("distilling"), random_state_kept(), torch.inference_mode(False), weights_restored(model):
        lessons = collect(dense, inputs_of(batches, batch_fn), everybody, samples)
        said = train(model, lessons, masks, passes=passes, lr=lr, processes=everybody, progress=progress)
        found = [p.detach().clone() for p in trained.values()]
    with torch.no_grad():
        for p, value in zip(trained.values(), found):
            p.copy_(value)
    return said


def inputs_of(batches: Iterable[Any], batch_fn: BatchFunction | None) -> Iterator[Any]:
    """The inputs of each batch."""
    for index, batch in enumerate(batches):
        yield as_batch(batch, index, batch_fn)[0]


def copy_of(inputs: Any) -> Any:
    """``inputs`` with copies of its tensors: a loader may use its memory again, a model may change them in place."""
    with torch.inference_mode(False):
        return tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)


def collect(
    dense: nn.Module, batches: Iterable[Any], among: Processes, samples: int, skip_bad: bool = False
) -> list[Lesson]:
    """The inputs of the first ``samples`` (of all processes together) with what ``dense`` says of them.

    Raises:
        ValueError: no batches; outputs that are not logits, or not finite (with ``skip_bad`` such a batch is left out).
    """
    device = next(iter(dense.parameters())).device
    mine, count, lessons = -(-samples // among.world_size), 0, []
    with eval_mode(dense), torch.no_grad():
        for index, batch in enumerate(batches):
            inputs = copy_of(batch)
            with failing("the dense model", index, inputs=inputs):
                target = log_probabilities(dense, inputs, device)
            if torch.isfinite(target).all():
                lessons.append(Lesson(inputs, target))
            elif not skip_bad:
                raise ValueError(
                    f"the dense network's outputs hold NaN or Inf on batch {index}: look at that batch's data, or at the network's weights"
                )
            count += len(target)
            if count >= mine:
                break
    if not lessons:
        raise ValueError("there is nothing to distill from: not one (good) batch came out of `batches`")
    return lessons


def of_logits(loss_fn: LossFunction) -> LossFunction:
    """``loss_fn``, which raises ``ValueError`` for outputs that are not logits."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        checked_logits(outputs)
        return loss_fn(outputs, targets)

    return loss


def zeros_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks (True = keep) of the parameters that hold zeros; biases and norms, which often begin at 0, are not masked."""
    return {n: p.detach() != 0 for n, p in parameters.items() if p.dim() > 1 and bool((p == 0).any())}


def _of(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``masks`` of ``parameters``, as bool; raise ``ValueError`` for other names or shapes."""
    check_masks(masks)
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks: no parameter that requires a gradient is called {name!r}")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
            )
    return {name: mask != 0 for name, mask in masks.items()}

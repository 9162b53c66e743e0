"""``shrink``: find the units, calibrate, eliminate, allocate, cut."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from capruner import checks
from capruner.batches import Batches, BatchFunction, default_loss, own_copy, plain
from capruner.calibration.finite import NO_GRADIENT
from capruner.calibration.gradients import GradientMode, LossFunction, gradient_slabs
from capruner.calibration.stream import CalibrationStream
from capruner.checks import show
from capruner.distributed import processes
from capruner.models.modes import eval_mode
from capruner.models.wrappers import unwrap
from capruner.shrinking.budget import Costs, allocate_units
from capruner.shrinking.channels import channel_groups
from capruner.shrinking.costs import multiply_adds_of
from capruner.shrinking.elimination import Reader, ReaderFisher, feed, solve
from capruner.shrinking.latency import fast_enough, seconds_of_layers
from capruner.shrinking.probing import Probe, heads, neurons
from capruner.shrinking.result import Shrunk
from capruner.shrinking.surgery import Removal, compare, why_not
from capruner.shrinking.units import KINDS, Group, LeftAlone

LITTLE = 0.25
"""A latency that is met with less than this part of its share of multiply-adds is warned of."""

SLAB = 8
"""Gradients that are kept before they are added to the Fisher matrices."""


def shrink(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction = default_loss,
    *,
    example_inputs: Any,
    macs: float | None = None,
    latency: float | None = None,
    units: str | Sequence[str] = KINDS,
    exclude: str | Sequence[str] = (),
    multiple_of: int = 8,
    num_grads: int = 512,
    gradients: GradientMode = "batch",
    damp: float = 0.01,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
) -> Shrunk:
    """Remove whole neurons, heads and channels, re-fit the weights that remain, and return a smaller dense copy that every runtime runs faster.

    The model itself is not changed. The copy has the same layers with fewer rows and columns, and trains, exports and saves like the dense one.

    >>> small = capruner.shrink(model, loader, macs=0.5, example_inputs=torch.randn(1, 3, 224, 224))
    >>> print(small.report())
    >>> small.save("small.safetensors")
    >>> model = capruner.load_shrunk("small.safetensors", timm.create_model("deit_small_patch16_224"))

    Args:
        model: any module; its parameters' device is where the work happens.
        batches, loss_fn, batch_fn: see :func:`capruner.prune`.
        macs: share of the model's multiply-adds that may remain, between 0 and 1. Units are ranked by predicted loss per multiply-add.
        latency: instead of ``macs``, share of the time of one call with ``example_inputs`` that may remain, measured on this machine as it is set up now
            (device, ``torch.set_num_threads``). Units are ranked by predicted loss per second of the layers that they are in, and models are cut and timed
            until one is fast enough; a busy machine makes that inexact.
        example_inputs: what the model is called with: a tensor, a tuple, or a dict of keywords. Multiply-adds are counted on it, and the smaller model is
            compared on it with the dense one whose removed units are set to zero.
        units: of ``"neurons"`` (pairs of linear layers, as in an MLP), ``"heads"`` (attention of timm and Hugging Face) and ``"channels"`` (convolutions;
            models with several need ``pip install 'capruner[shrink]'``). What could not be removed, and why, is in ``left_alone`` and in the report.
        exclude: names of modules, or ``re:`` patterns of them, whose units all remain.
        multiple_of: channels are removed this many at a time where their number is a multiple of it, and larger. Runtimes compute 8 or 16 channels at a time,
            and can be slower with fewer that are no multiple: onnxruntime's convolutions want 8 on CPUs with AVX2. 1 comes closest to the target.
        num_grads: gradients that the Fisher matrices are estimated from: batches, or samples with ``gradients="sample"``.
        gradients: ``"batch"`` or ``"sample"``.
        damp: added to the diagonal of the Fisher matrices, relative to its mean.
        progress: show progress bars.

    Raises:
        ValueError: an invalid argument or data; no units to remove; a target that is out of reach.
        ModuleNotFoundError: torch-pruning is needed and not installed.
    """
    kinds = [units] if isinstance(units, str) else list(units)
    _check(locals())
    model = unwrap(model)
    checks.check_finite(model)
    device = next(model.parameters()).device
    inputs = own_copy(plain(example_inputs), device)
    with eval_mode(model):
        groups, left_alone = find_units(model, inputs, kinds, exclude)
        costs = multiply_adds_of(model, inputs, [group.attention for group in groups if group.attention])
        stream = CalibrationStream(Batches(batches, batch_fn), device)
        readers = _calibrated(model, stream, loss_fn, groups, num_grads, gradients, damp, progress)
    plan = _Plan(model, inputs, groups, readers, solve(groups, readers, progress), multiple_of)
    seconds = {}
    if macs is not None:
        small, (removal, counts) = plan.cut(macs, costs)
    else:
        assert latency is not None
        timed = seconds_of_layers(model, inputs, groups)
        small, (removal, counts), both = fast_enough(lambda share: plan.cut(share, timed), model, inputs, latency)
        seconds = {"seconds": both}
    rows = [{"name": g.name, "kind": g.kind, "units": g.units, "left": g.units - counts[g.name]} for g in groups]
    totals = _costs(costs, model, small, inputs)
    if latency is not None:
        _warn_of_little(totals["macs"][1] / totals["macs"][0], latency)
    return Shrunk(small, removal, rows, left_alone, totals | seconds)


def _warn_of_little(macs: float, latency: float) -> None:
    """Warn where the time was met with far fewer multiply-adds than its share: most of a call is spent elsewhere, and such a model may have lost everything."""
    if macs < LITTLE * latency:
        warnings.warn(
            f"latency={latency:g} was reached with {macs:.1%} of the multiply-adds: most of a call's time is not spent in the layers that shrink. "
            "Measure the accuracy; a larger batch in example_inputs, or macs= instead of latency=, may fit better",
            stacklevel=3,
        )


def _check(arguments: Mapping[str, Any]) -> None:
    checks.check_model(arguments["model"])
    checks.check_batches(arguments["batches"])
    checks.check_function("loss_fn", arguments["loss_fn"], "of outputs and targets")
    if (arguments["macs"] is None) == (arguments["latency"] is None):
        raise ValueError(
            "give one of macs (the share of multiply-adds that may remain) and latency (of the measured time)"
        )
    for name in ("macs", "latency"):
        share = arguments[name]
        if share is not None and (not checks.is_number(share) or not 0 < share < 1):
            raise ValueError(f"{name} must be the share that may remain, between 0 and 1, got {show(share)}")
    kinds = arguments["kinds"]
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"units must be some of {list(KINDS)}, got {show(kinds)}")
    checks.check_names("exclude", arguments["exclude"])
    checks.check_count("multiple_of", arguments["multiple_of"])
    checks.check_count("num_grads", arguments["num_grads"])
    checks.check_number("damp", arguments["damp"])
    checks.check_flag("progress", arguments["progress"])
    if processes().world_size > 1:
        raise ValueError(
            f"shrink works in one process, and torch.distributed has {processes().world_size}: call it before that is initialised"
        )


def find_units(
    model: nn.Module, inputs: Any, kinds: Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[list[Group], list[LeftAlone]]:
    """The groups of units of some kinds; raise ``ValueError`` if there are none."""
    probe = Probe(model, inputs)
    groups: list[Group] = []
    left: list[LeftAlone] = []
    for kind, find in (("neurons", neurons), ("heads", heads)):
        if kind in kinds:
            found, not_found = find(probe)
            groups += found
            left += not_found
    if "channels" in kinds:
        found, not_found = channel_groups(model, inputs)
        groups += found
        left += not_found
    entries = [exclude] if isinstance(exclude, str) else list(exclude)
    for entry in entries:
        if not any(_is_in(group, entry) for group in groups):
            raise ValueError(
                f"exclude: {entry!r} is not the name of a module with units to remove: {[group.name for group in groups]}"
            )
    frozen = {n.rpartition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    chosen = []
    for group in groups:
        if any(_is_in(group, entry) for entry in entries):
            left.append(LeftAlone(group.name, "excluded"))
        elif still := [cut.layer for cut in group.readers if cut.layer in frozen]:
            left.append(
                LeftAlone(group.name, f"{still[0]} is frozen (requires_grad=False), and would have to be re-fitted")
            )
        elif reason := why_not(model, group, inputs):
            left.append(LeftAlone(group.name, reason))
        else:
            chosen.append(group)
    if not chosen:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in left[:5])
        raise ValueError(f"the model has no {' or '.join(kinds)} to remove{': ' if reasons else ''}{reasons}")
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(chosen, key=lambda group: place[group.name]), left


def _is_in(group: Group, entry: str) -> bool:
    if entry.startswith("re:"):
        return re.search(entry.removeprefix("re:"), group.name) is not None
    return group.name == entry or group.name.startswith(f"{entry}.")


def _calibrated(
    model: nn.Module,
    stream: CalibrationStream,
    loss_fn: LossFunction,
    groups: Sequence[Group],
    num_grads: int,
    gradients: GradientMode,
    damp: float,
    progress: bool,
) -> dict[str, Reader]:
    """The layers that read units, with their inverse Fisher matrices."""
    layers = {cut.layer: model.get_submodule(cut.layer) for group in groups for cut in group.readers}
    fishers = {name: ReaderFisher(layer, num_grads, damp) for name, layer in layers.items()}
    parameters = {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers.items()}
    slabs = gradient_slabs(model, stream, loss_fn, parameters, num_grads, mode=gradients, slab=SLAB, progress=progress)
    feed(fishers, slabs)
    if not any(fisher.heard for fisher in fishers.values()):
        raise ValueError(NO_GRADIENT)
    return {name: fisher.solve() for name, fisher in fishers.items()}


@dataclass(frozen=True)
class _Plan:
    """All that smaller models are cut from: ``eliminated`` holds the order of each group's units, and the loss of each step."""

    model: nn.Module
    inputs: Any
    groups: Sequence[Group]
    readers: Mapping[str, Reader]
    eliminated: Mapping[str, tuple[Tensor, Tensor]]
    multiple_of: int

    def cut(self, share: float, costs: Costs) -> tuple[nn.Module, tuple[Removal, dict[str, int]]]:
        """A model with ``share`` of the costs, compared with the dense one that has the same weights and zeros for what is removed; what was removed, and
        the number of units of each group."""
        losses = {name: loss for name, (_, loss) in self.eliminated.items()}
        counts = allocate_units(self.model, self.groups, losses, costs, share, self.multiple_of)
        removed = {name: order[: counts[name]] for name, (order, _) in self.eliminated.items()}
        twin = copy.deepcopy(self.model)
        removal = Removal.of(self.model, self.groups, removed)
        for name, reader in self.readers.items():
            if gone := removal.layers.get(name, {}).get("in"):
                reader.write_to(twin.get_submodule(name), gone)
        removal.zero(twin)
        small = copy.deepcopy(twin)
        removal.apply(small)
        compare(twin, small, self.inputs)
        return small, (removal, counts)


def _costs(dense: Costs, model: nn.Module, small: nn.Module, inputs: Any) -> dict[str, tuple[float, float]]:
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    return {"macs": (dense.total, multiply_adds_of(small, inputs).total), "parameters": (parameters[0], parameters[1])}

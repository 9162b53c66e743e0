"""What our modifiers share: SparseML's life cycle on one side, :func:`capruner.prune` on the other.

SparseML lets a scorer hand scores to a mask creator, which decides the masks; the scorer then changes weights. Two truths about which weights stay are one
too many: here the engine decides masks and weights together, and the scorer and the mask creator that SparseML insists on are empty.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from sparseml.pytorch.sparsification.modifier import ModifierProp
from sparseml.pytorch.sparsification.pruning.mask_creator import PruningMaskCreator
from sparseml.pytorch.sparsification.pruning.mask_params import ModuleParamPruningMask
from sparseml.pytorch.sparsification.pruning.modifier_pruning_base import BaseGradualPruningModifier
from sparseml.pytorch.sparsification.pruning.scorer import PruningParamsScorer
from sparseml.pytorch.utils import NamedLayerParam
from sparseml.utils import FROM_PARAM_TOKEN
from torch import Tensor, nn

from capruner.checkpoint import remove_state
from capruner.checks import refuse_unknown
from capruner.config import Knob, PruneConfig, recipe_knobs
from capruner.core.patterns import parse_mask_type
from capruner.methods import MethodName
from capruner.models.mask_types import supporting
from capruner.models.selection import select_parameters
from capruner.models.weights import linear_weights
from capruner.models.wrappers import owner
from capruner.planning import Plan, plan
from capruner.pruning import prune
from capruner.recipes import values
from capruner.recipes.updates import next_sparsity, prune_resumably
from capruner.recomputation import INTERPOLATIONS
from capruner.result import PruningResult
from capruner.rows import zero_share
from capruner.sparseml.sampling import GradSamplerBatches
from capruner.sparseml.state import load_modifier_state, modifier_state
from capruner.training.schedules import SAME_EPOCH, sparsity_at

_LOGGER = logging.getLogger(__name__)


def recipe_parameter(name: str, doc: str) -> Any:
    """A ``ModifierProp`` over ``self._name``: read from the recipe, saved with it, fixed once initialized."""

    def get(self: Any) -> Any:
        return getattr(self, f"_{name}")

    def put(self: Any, value: Any) -> None:
        setattr(self, f"_{name}", value)

    get.__doc__, get.__name__ = doc, name
    return ModifierProp()(get).setter(put)


class _Unused(PruningParamsScorer, PruningMaskCreator):
    """Fills the two places that SparseML's base class wants filled. Reaching it would mean that a mask was decided elsewhere."""

    def score_parameters(self) -> list[Tensor]:
        raise RuntimeError("masks and weights are decided by capruner.prune; nothing is scored through SparseML")

    def create_sparsity_masks(self, tensors: Any, target: Any, global_sparsity: bool = False) -> list[Tensor]:
        raise RuntimeError("masks and weights are decided by capruner.prune; no mask is created through SparseML")


class CorrelationAwareModifier(BaseGradualPruningModifier):
    """The life cycle of a SparseML modifier around :func:`capruner.prune`. Subclasses name their method.

    Needs ``grad_sampler={"data_loader_builder": f, "loss_function": g}`` in the manager's ``modify()`` or ``apply()``.

    Args:
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``; ``[]`` when ``final_sparsity`` is a dict.
        init_sparsity: sparsity at ``start_epoch``, or ``__FROM_PARAM__``.
        final_sparsity: sparsity at ``end_epoch``, or a dict ``{sparsity: [params]}`` (with ``global_sparsity: False``).
        start_epoch, end_epoch, update_frequency, inter_func, leave_enabled: SparseML's schedule.
        global_sparsity: one target over all layers; False: each layer its own. None: as the modifier's class says.
        mask_type: as in :class:`capruner.PruneConfig`, quoted or not; ``N:M`` takes its numbers from ``n`` and ``m``.
        n, m: for ``mask_type: N:M``; saved as part of ``mask_type``.
        grad_sampler_kwargs: passed to the ``data_loader_builder``.
        traces_backup_dir: the checkpoint folder of a calibration, ``state_dir`` of :func:`capruner.prune`.
        knobs: the knobs of :class:`capruner.PruneConfig` that the method reads, with the same names and defaults.

    Raises:
        TypeError: an unknown parameter.
        ValueError: an invalid value.
    """

    method: ClassVar[MethodName]
    _globally: ClassVar[bool]
    _knobs: ClassVar[Mapping[str, Knob]]

    def __init_subclass__(cls, method: MethodName, globally: bool) -> None:
        super().__init_subclass__()
        cls.method, cls._globally, cls._knobs = method, globally, recipe_knobs(method)
        for name, knob in cls._knobs.items():
            setattr(cls, name, recipe_parameter(name, knob.help))

    def __init__(
        self,
        params: str | list[str],
        init_sparsity: float | str,
        final_sparsity: float | dict[float, list[str]],
        start_epoch: float,
        end_epoch: float,
        update_frequency: float,
        leave_enabled: bool = True,
        inter_func: str = "cubic",
        global_sparsity: bool | None = None,
        mask_type: str | int = PruneConfig.mask_type,
        n: int | None = None,
        m: int | None = None,
        grad_sampler_kwargs: dict[str, Any] | None = None,
        traces_backup_dir: str | None = None,
        **knobs: Any,
    ) -> None:
        who = type(self).__name__
        refuse_unknown(knobs, self._knobs, who)
        globally = self._globally if global_sparsity is None else global_sparsity
        final: Any = values.final_sparsity(who, final_sparsity, globally)
        first = init_sparsity if init_sparsity == FROM_PARAM_TOKEN else values.sparsity(who, init_sparsity)
        super().__init__(
            params=params,
            init_sparsity=first,
            final_sparsity=final,
            inter_func=inter_func,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            update_frequency=update_frequency,
            global_sparsity=globally,
            leave_enabled=leave_enabled,
            parent_class_kwarg_names=[],
        )
        values.check_schedule(who, leave_enabled, grad_sampler_kwargs, traces_backup_dir)
        values.converted(who, "inter_func", values.one_of(*INTERPOLATIONS), inter_func)
        self._grad_sampler_kwargs = grad_sampler_kwargs or {}
        self._traces_backup_dir = values.none_or(str)(traces_backup_dir)
        knobs["mask_type"] = parse_mask_type(mask_type, n, m)
        for name, knob in self._knobs.items():
            value = knobs.get(name, knob.default)
            setattr(self, f"_{name}", values.converted(who, name, knob.kind.convert, value))
        self._batches: GradSamplerBatches | None = None
        self._reached_epoch = 0.0
        self._state_served = False

    grad_sampler_kwargs = recipe_parameter("grad_sampler_kwargs", "Passed to the data_loader_builder.")
    traces_backup_dir = recipe_parameter("traces_backup_dir", "Checkpoint folder of a calibration.")

    # What SparseML calls

    def initialize(self, module: nn.Module, epoch: float = 0, loggers: Any = None, **kwargs: Any) -> None:
        """Take the ``grad_sampler``, find the parameters; in one-shot (``epoch=inf``) prune at once.

        Raises:
            RuntimeError: no usable ``grad_sampler``.
            ValueError: parameters that cannot be selected.
        """
        self._batches = GradSamplerBatches(kwargs.get("grad_sampler"), self._grad_sampler_kwargs)
        super().initialize(module, epoch, loggers, **kwargs)

    def initialize_extras(self, module: nn.Module) -> None:
        """A mask that another modifier has put on a parameter is taken over, so that a ladder of modifiers continues instead of starting again."""
        super().initialize_extras(module)
        if self._init_sparsity_orig == FROM_PARAM_TOKEN:
            self._init_sparsity = [zero_share([p]) for p in self._module_masks.params_data]
        self._adopt_masks()

    def check_mask_update(self, module: nn.Module, epoch: float, steps_per_epoch: int, **kwargs: Any) -> None:
        """Prune to the sparsity of this epoch. Called by SparseML after the backward pass and before the optimizer's step of an update epoch."""
        started = self.started
        if self.start_pending(epoch, steps_per_epoch):
            self._adopt_masks()
            self._module_masks.enabled = True
            started = True
        self._pre_step_completed = True
        if started:
            self._applied_sparsity = self.get_applied_sparsity_for_epoch(epoch, steps_per_epoch)
            self._prune(module, self._applied_sparsity)
            self._sparsity_applied = True
        if self.end_pending(epoch, steps_per_epoch):
            self._module_masks.pruning_end(self._leave_enabled)

    def update_ready(self, epoch: float, steps_per_epoch: int) -> bool:
        """Whether an update is due: the first step at or after ``start_epoch + k * update_frequency``, and at ``end_epoch``."""
        frequency_over = (
            self.enabled
            and self.started
            and not self.ended
            and self.update_frequency > 0
            and epoch + SAME_EPOCH >= self._last_update_epoch + self.update_frequency
        )
        return bool(super().update_ready(epoch, steps_per_epoch) or frequency_over)

    def update(self, module: nn.Module, optimizer: Any, epoch: float, steps_per_epoch: int) -> None:
        """SparseML counts the next update from the step of this one, so that one that came between two steps delays all that follow; here they keep time."""
        super().update(module, optimizer, epoch, steps_per_epoch)
        if self.update_frequency > 0:
            start = max(self.start_epoch, 0.0)
            due = math.floor((epoch - start + SAME_EPOCH) / self.update_frequency)
            self._last_update_epoch = start + due * self.update_frequency

    def optimizer_post_step(self, module: nn.Module, optimizer: Any, epoch: float, steps_per_epoch: int) -> None:
        """Masks again, after the optimizer's step."""
        super().optimizer_post_step(module, optimizer, epoch, steps_per_epoch)
        self._reached_epoch = epoch + 1 / steps_per_epoch

    def finalize(self, module: nn.Module | None = None, reset_loggers: bool = True, **kwargs: Any) -> None:
        """The last update, if training ended exactly at ``end_epoch`` and so before the step that would have brought it; then SparseML's own."""
        due = self.started and not self.ended and self._reached_epoch + SAME_EPOCH >= self.end_epoch >= 0
        if due and module is not None:
            self._prune(module, self.get_applied_sparsity_for_epoch(self.end_epoch, 1))
            self._ended = True
        if self._state_served:
            self.remove_state()
        super().finalize(module, reset_loggers, **kwargs)

    def remove_state(self) -> None:
        """Delete the state of a killed calibration, when its result is safe. Without ``traces_backup_dir`` there is none."""
        self._state_served = False
        if self._traces_backup_dir:
            remove_state(self._traces_backup_dir)

    def state_dict(self) -> dict[str, Any]:
        """Masks and place in the schedule, see :mod:`capruner.sparseml.state`."""
        return modifier_state(self)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Restore :meth:`state_dict`: masks hold at once, and the next update is on schedule. The modifier must be initialized."""
        if not self.initialized:
            raise RuntimeError("load_state_dict needs an initialized modifier: call the manager's modify() first")
        load_modifier_state(self, state_dict)

    def get_applied_sparsity_for_epoch(self, epoch: float, steps_per_epoch: int) -> list[float]:
        """Per parameter; the final sparsity in one-shot and from ``end_epoch`` on."""
        count = len(self._module_masks.layers)
        first = self._init_sparsity if isinstance(self._init_sparsity, list) else [self._init_sparsity] * count
        final = self._final_sparsity if isinstance(self._final_sparsity, list) else [self._final_sparsity] * count
        start, end = self.start_epoch, self.end_epoch
        return [sparsity_at(epoch, a, b, start, end, self.inter_func) for a, b in zip(first, final)]

    def one_shot(
        self, module: nn.Module, sparsities: list[float], grad_sampler: Mapping[str, Any], **more: Any
    ) -> PruningResult:
        """One calibration, with this recipe's parameters, for a whole list of sparsities. ``module`` is not changed; the modifier stays as it is.

        With ``traces_backup_dir`` a calibration that was killed resumes; call :meth:`remove_state` when its result is safe.

        Args:
            sparsities: in [0, 1); the recipe's own ``final_sparsity`` is not looked at unless the list is empty.
            grad_sampler: as SparseML wants it, see :class:`capruner.sparseml.sampling.GradSamplerBatches`.
            more: for :func:`capruner.prune`, what no recipe says: ``costs``.
        """
        batches = GradSamplerBatches(grad_sampler, self._grad_sampler_kwargs)
        sparsity = sparsities or self.final_sparsity
        return self._call_prune(module, batches, sparsity, self._all_params, None, **more)

    def one_shot_plan(self, module: nn.Module, grad_sampler: Mapping[str, Any]) -> Plan:
        """What :meth:`one_shot` would do, see :func:`capruner.plan`."""
        batches = GradSamplerBatches(grad_sampler, self._grad_sampler_kwargs)
        return plan(module, batches, batches.loss, params=self._all_params, config=self._config)

    # What SparseML asks for

    def _create_named_layers_and_params(self, module: nn.Module) -> list[NamedLayerParam]:
        final = self._final_sparsity_orig
        groups = final.items() if isinstance(final, dict) else [(None, self._params)]
        found: dict[str, Any] = {}
        parameters: dict[str, nn.Parameter] = {}
        for sparsity, names in groups:
            for name, parameter in select_parameters(module, names, self._exclude).items():
                found.setdefault(name, sparsity)
                parameters[name] = parameter
        _, skipped = supporting(
            parse_mask_type(self._mask_type), parameters, self._skip_unsupported, linear_weights(module)
        )
        for name in skipped:
            _LOGGER.info("%s cannot hold mask_type %s and stays dense", name, self._mask_type)
            del found[name]
        if isinstance(final, dict):
            self._final_sparsity = list(found.values())
        named = []
        for name in found:
            layer, param_name = owner(module, name)
            named.append(NamedLayerParam(name.rpartition(".")[0], layer, param_name, getattr(layer, param_name)))
        return named

    def _get_mask_creator(self, param_names: list[str], params: list[nn.Parameter]) -> PruningMaskCreator:
        return _Unused(params)

    def _get_scorer(self, params: list[nn.Parameter]) -> PruningParamsScorer:
        return _Unused(params)

    # The two sides meet

    @property
    def _all_params(self) -> Any:
        """The selection: ``params``, or the groups of a dict of sparsities."""
        if isinstance(self.final_sparsity, dict):
            return [name for group in self.final_sparsity.values() for name in group]
        return self.params

    @property
    def _config(self) -> PruneConfig:
        knobs = {name: getattr(self, f"_{name}") for name in self._knobs}
        return PruneConfig(method=self.method, global_sparsity=self.global_sparsity, **knobs)

    @property
    def _names(self) -> list[str]:
        masks = self._module_masks
        return [f"{layer}.{param}" if layer else param for layer, param in zip(masks.layer_names, masks.param_names)]

    def _masks(self) -> dict[str, Tensor]:
        return {name: mask != 0 for name, mask in zip(self._names, self._module_masks.param_masks)}

    def _adopt_masks(self) -> None:
        masks = self._module_masks
        for index, (layer, param) in enumerate(zip(masks.layers, masks.param_names)):
            for other in _masks_on(layer, param, besides=masks):
                masks._param_masks[index] = masks._param_masks[index] * other.to(masks._param_masks[index])

    def _prune(self, module: nn.Module, targets: list[float]) -> None:
        names, masks = self._names, self._masks()
        sparsity = next_sparsity(masks, dict(zip(names, targets)), self.global_sparsity)
        if sparsity is None:
            self._module_masks.apply()
            return
        assert self._batches is not None
        batches = self._batches
        if self._state_served:  # by the update before this one, whose weights a checkpoint has by now
            self.remove_state()
        result = prune_resumably(
            lambda: self._call_prune(module, batches, sparsity, names, masks), self._traces_backup_dir or None
        )
        self._state_served = bool(self._traces_backup_dir)
        result.apply(module)
        pruned = result.masks()
        self._module_masks.set_param_masks(
            [pruned[name].to(mask) for name, mask in zip(names, self._module_masks.param_masks)]
        )

    def _call_prune(
        self,
        module: nn.Module,
        batches: GradSamplerBatches,
        sparsity: Any,
        params: Any,
        masks: dict[str, Tensor] | None,
        **more: Any,
    ) -> PruningResult:
        return prune(
            module,
            batches,
            batches.loss,
            sparsity,
            params=params,
            masks=masks,
            state_dir=self._traces_backup_dir or None,
            config=self._config,
            **more,
        )


def _masks_on(layer: nn.Module, param: str, besides: ModuleParamPruningMask) -> list[Tensor]:
    """The masks that other SparseML modifiers hold on a parameter; their forward hooks are the only place where these can be seen."""
    found = []
    for hook in layer._forward_pre_hooks.values():
        if not isinstance(hook, partial):
            continue
        owner = getattr(hook.func, "__self__", None)
        if isinstance(owner, ModuleParamPruningMask) and owner is not besides and owner.enabled:
            index = hook.args[0]
            if owner.param_names[index] == param:
                found.append(owner.param_masks[index])
    return found

"""``--resume`` with changed arguments: each takes effect or is refused by name, as the tables here say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from capruner.cli.arguments import UserError, flag

WITHOUT_EFFECT = {
    *("resume", "debug", "config", "sparseml_recipe", "data_dir", "output", "experiment", "device", "local_rank"),
    *("timeout", "workers", "pin_mem", "val_batch_size", "grad_checkpointing"),
    *("log_sparsity", "log_wandb", "log_param_histogram", "checkpoint_freq", "save_last"),
}
"""Where and how a run works, and what it writes: free to change. (The recipe's text is compared, not its path.)"""

EACH_EPOCH = {
    *("epochs", "seed", "gs_batch_size", "gs_aug", "no_prefetcher", "channels_last", "sync_bn", "dist_bn"),
    *("model_ema_decay", "model_ema_warmup", "clip_grad", "clip_mode"),
    *("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob"),
    *(
        "grayscale_prob",
        "gaussian_blur_prob",
        "aa",
        "train_interpolation",
        "reprob",
        "remode",
        "recount",
        "aug_repeats",
    ),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch"),
    *("smoothing", "bce_loss", "bce_target_thresh"),
}
"""Read in each epoch and not part of a saved state: take effect from the next epoch on."""

SCHEDULE = {
    *("sched", "sched_on_updates", "lr", "lr_noise", "lr_noise_pct", "lr_noise_std", "lr_cycle_mul", "lr_cycle_decay"),
    *("lr_cycle_limit", "lr_k_decay", "lr_decay_fn", "lr_stable_timescale", "warmup_lr", "min_lr", "decay_milestones"),
    *("decay_epochs", "warmup_epochs"),
    *("warmup_prefix", "cooldown_epochs", "patience_epochs", "decay_rate"),
}
"""The learning rate follows the new schedule from the next epoch on; refused where the recipe or plateau sets the rate."""

OPTIMIZER = {"momentum", "weight_decay", "opt_eps", "opt_betas", "opt_args"}
"""Written into the restored optimizer; refused where that optimizer has no such value."""

RATE_SOURCES = {"lr_base", "lr_base_size", "lr_base_scale"}
"""Take effect through ``lr``, which is computed from them unless it is given."""

STARTING = {"pretrained", "checkpoint", "random_weights"}
"""Where the first weights came from: may be left out when resuming, but not changed."""

# All others determine the weights, the saved state or the measurements so far, and are refused: the model, the data, --batch-size, --opt, ...


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as values for a checkpoint or YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(args).items()}


def changed_arguments(then: Mapping[str, Any], args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """``{argument: (value before, value now)}`` of those that matter; raise ``UserError`` for one that cannot change."""
    now = plain(args)
    keys = sorted((then.keys() | now.keys()) - WITHOUT_EFFECT)
    changes = {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
    for key in STARTING & changes.keys():
        if not now.get(key):
            del changes[key]
    for key, values in changes.items():
        if key not in EACH_EPOCH | SCHEDULE | OPTIMIZER | RATE_SOURCES:
            _refuse(key, values, "what was trained so far depends on it")
    return changes


def check_state(saved: Mapping[str, Any], epochs: int, here: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if recipe, steps per epoch or number of processes (``here``) changed, or more epochs are done than ``epochs``."""
    if saved["epoch"] > epochs:
        raise UserError(f"--resume: --epochs {epochs}, but {saved['epoch']} epochs are done already; ask for more")
    if saved["recipe"] != here["recipe"]:
        raise UserError(
            "--resume: the recipe has another text than before; resume with recipe.yaml of the experiment's folder, or start another --experiment"
        )
    for key, what in (("steps_per_epoch", "steps in an epoch"), ("processes", "processes")):
        if saved[key] != here[key]:
            raise UserError(
                f"--resume: {what}: {saved[key]} before, {here[key]} now; resume with the same images, batch size and number of processes"
            )


def check_schedule(changes: Mapping[str, tuple[Any, Any]], recipe_sets_rate: bool, sched: str) -> None:
    """Raise ``UserError`` for changes of the learning rate that would have no effect."""
    for key, values in changes.items():
        if key in RATE_SOURCES and "lr" not in changes:
            _refuse(key, values, "--lr is given and goes before it")
        if key in SCHEDULE | RATE_SOURCES and recipe_sets_rate:
            _refuse(key, values, "the recipe sets the learning rate")
        if key in SCHEDULE | RATE_SOURCES and "plateau" in (sched, *changes.get("sched", ())):
            _refuse(key, values, "--sched plateau keeps its rate in its own state")


def check_groups(changes: Mapping[str, tuple[Any, Any]], saved: Mapping[str, Any], optimizer: Any) -> None:
    """Raise ``UserError`` if the saved optimizer state has other parameter groups. Without weight decay there is one instead of two, for example."""
    then, now = (
        [len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if then == now:
        return
    for key in sorted(OPTIMIZER & changes.keys()):
        _refuse(key, changes[key], "it would need other parameter groups")
    raise UserError(
        f"--resume: the optimizer has parameter groups of {now} tensors now, of {then} before; resume with the same timm"
    )


def adjust_optimizer(
    optimizer: Any,
    then: Mapping[str, Any],
    changes: Mapping[str, tuple[Any, Any]],
    build: Callable[..., Any],
    rate: bool,
) -> None:
    """Write changed hyperparameters into the restored parameter groups.

    Args:
        build: makes a new optimizer from an ``argparse.Namespace``.
        rate: write ``lr`` too, which nothing else sets.

    Raises:
        UserError: names an argument that the optimizer has no value for, or that would need other parameter groups.
    """
    for key in sorted((OPTIMIZER | {"lr"} if rate else OPTIMIZER) & changes.keys()):
        old = _by_parameter(build(argparse.Namespace(**then)))
        new = _by_parameter(build(argparse.Namespace(**{**then, key: changes[key][1]})))
        found = False
        for group in optimizer.param_groups:
            different = [_differences(old[id(p)], new[id(p)]) for p in group["params"]]
            if any(other != different[0] for other in different):
                _refuse(key, changes[key], "it would need other parameter groups")
            group.update(different[0])
            found = found or bool(different[0])
        if not found:
            _refuse(key, changes[key], f"--opt {then['opt']} has no such value")


def _by_parameter(optimizer: Any) -> dict[int, Mapping[str, Any]]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    no_values = ("params", "param_names", "name", "initial_lr")
    return {key: value for key, value in new.items() if key not in no_values and old.get(key) != value}


def _refuse(key: str, values: tuple[Any, Any], why: str) -> None:
    raise UserError(
        f"--resume: {flag(key)} was {values[0]!r} and is {values[1]!r} now, which cannot change: {why}. "
        f"Resume with {values[0]!r}, or start another --experiment"
    )

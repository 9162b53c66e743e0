"""One training run in which a recipe prunes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from capruner.cli import arguments as cli
from capruner.recipes import checked_text
from capruner.recipes.text import stored_text
from capruner.report import write_report
from capruner.rows import zero_share
from capruner.vision import data as images
from capruner.vision import modeling, output, training_resume
from capruner.vision.training_arguments import parse
from capruner.vision.training_checkpoint import load_training, save_state, save_weights
from capruner.vision.training_data import GradientSamples, train_loader, validation_loader
from capruner.vision.training_log import Log, learning_rate
from capruner.vision.training_loop import Stepper, measure, precision, train_one_epoch, training_loss
from capruner.vision.training_processes import Processes, parallel, started
from capruner.vision.training_recipe import apply_masks, epochs, open_training
from capruner.vision.training_schedule import Schedule


class Training:
    """One run: the model, its data, optimizer and recipe, and how far it is."""

    def __init__(self, args: argparse.Namespace, processes: Processes, folder: Path) -> None:
        self.args, self.processes, self.folder = args, processes, folder
        saved = self._saved()
        self.recipe = open_training(args.sparseml_recipe, args.engine, self.folder, args.sparsities)
        args.engine = self.recipe.name  # compared when training resumes
        args.epochs = self.epochs = epochs(self.recipe, args)  # timm's schedulers read it
        if saved:
            training_resume.changed_arguments(saved["arguments"], args)
        modeling.seed_everything(args.seed, 0, 0)  # the same new layers on every process
        if saved:  # all weights come from there
            self.model = modeling.build_model(args.model, args.model_kwargs, "", pretrained=False)
        else:
            cli.check_weights(args)
            self.model = modeling.build_model(args.model, args.model_kwargs, args.checkpoint, args.pretrained)
        self.recipe.check(self.model)
        self._prepare_model()
        train, val = images.open_splits(args.data_dir, args.dataset, self.model)
        config = images.preprocessing(args, self.model)
        for training in (False, True):
            modeling.check_forward(self.model, config["input_size"], args.model, training)
        self.val = validation_loader(val, config, args, processes)
        self.train, self.mixup = train_loader(train, config, args, processes, self.model.num_classes)
        self.steps_per_epoch = -(-len(self.train) // args.grad_accum_steps)
        self.autocast, self.scaler = precision(args, processes.device)
        self.optimizer = self._optimizer()
        self.ema = None
        if args.model_ema:  # before the recipe puts hooks on the model, which must not be copied
            self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if self.recipe.sets_learning_rate:
            processes.say("the recipe sets the learning rate: --sched, --lr and warm-up are off")
        self.schedule = Schedule(self.optimizer, args, self.steps_per_epoch, not self.recipe.sets_learning_rate)
        self.loss = training_loss(args).to(processes.device)
        self.epoch = self.steps = 0
        self.best: dict[str, dict[str, Any]] = {}
        self.log = Log(self.folder, args, f"{args.model}, {Path(args.sparseml_recipe).stem}")
        if saved:
            self.epoch, self.steps = saved["epoch"], saved["steps"]
            try:
                self.model.load_state_dict(saved["model"])
            except RuntimeError as error:
                raise cli.UserError(
                    f"--resume: the weights do not fit {args.model} as it is built now: {cli.describe(error)}"
                ) from error
        self.wrapped = parallel(self.model, processes)
        samples = GradientSamples(train, config, args, processes, lambda: self.steps)
        stepper = Stepper(self.model, self.optimizer, self.scaler, args)
        # Not the wrapped model: its names would begin with "module."
        self.recipe.attach(self.model, self.optimizer, stepper, self.steps_per_epoch, self.epoch, samples)
        if saved:
            self._restore(saved)

    def _prepare_model(self) -> None:
        args = self.args
        self.model.to(self.processes.device)
        if args.grad_checkpointing:
            try:
                self.model.set_grad_checkpointing(enable=True)
            except Exception as error:  # not every architecture has it
                raise cli.UserError(
                    f"--grad-checkpointing: {args.model} does not support it ({cli.describe(error)}); leave it out"
                ) from error
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if args.sync_bn and self.processes.size > 1:
            self.model = convert_sync_batchnorm(self.model)

    def _optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        if args.lr is None:
            scale = args.lr_base_scale or ("sqrt" if any(name in args.opt for name in ("ada", "lamb")) else "linear")
            ratio = args.batch_size * self.processes.size * args.grad_accum_steps / args.lr_base_size
            args.lr = args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
        return self._build_optimizer(args)

    def _build_optimizer(self, args: argparse.Namespace) -> torch.optim.Optimizer:
        try:
            return create_optimizer_v2(self.model, **optimizer_kwargs(cfg=args))
        except Exception as error:  # whatever timm, or the optimizer, trips over
            some = ", ".join(list_optimizers()[:12])
            raise cli.UserError(
                f"--opt {args.opt} cannot be built: {cli.describe(error)}; timm has {some}, ..."
            ) from error

    def _saved(self) -> dict[str, Any] | None:
        last, resume = self.folder / "last.pt", self.args.resume
        if resume is None:
            if (self.folder / "summary.json").exists():
                raise cli.UserError(f"{self.folder} holds a run of one-shot pruning; choose another --experiment")
            if last.exists():
                raise cli.UserError(
                    f"{last} belongs to an earlier run; continue it with --resume, or choose another --experiment, or delete that folder"
                )
            return None
        if resume == "last":
            if not last.exists():
                self.processes.say(f"nothing to resume in {self.folder} yet: starting")
                return None
            return load_training(last)
        return load_training(Path(resume))

    def _restore(self, saved: dict[str, Any]) -> None:
        then, rated = saved["arguments"], self.recipe.sets_learning_rate
        changes = training_resume.changed_arguments(then, self.args)
        training_resume.check_state(saved, self.epochs, self._surroundings())
        training_resume.check_schedule(changes, rated, self.args.sched)
        for key, (before, now) in changes.items():
            self.processes.say(f"note: {cli.flag(key)} was {before!r}, it is {now!r} from here on")
        training_resume.check_groups(changes, saved["optimizer"], self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])
        unscheduled = self.args.sched == "none" and not rated
        training_resume.adjust_optimizer(self.optimizer, then, changes, self._build_optimizer, unscheduled)
        self.schedule.load_state_dict(saved["scheduler"])
        self.schedule.place(self.epoch, self.steps)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.recipe.load_state_dict(saved["manager"])
        self.best = saved["best"]
        self.log.rows, self.log.updates = saved["rows"], saved["updates"]
        self.log.wandb_id = saved["wandb_id"]
        self.processes.say(
            f"resumed after epoch {self.epoch} at sparsity {zero_share(self.recipe.masks().values()):.4f}"
        )

    def _surroundings(self) -> dict[str, Any]:
        return {
            "recipe": checked_text(self.args.sparseml_recipe),
            "steps_per_epoch": self.steps_per_epoch,
            "processes": self.processes.size,
        }

    def run(self) -> None:
        """Train to the end."""
        if self.processes.first:
            self.log.open_wandb()
            self._write_arguments()
        if not self.log.rows:
            self._finish_epoch({}, time.perf_counter())
        while self.epoch < self.epochs:
            began = time.perf_counter()
            self.epoch += 1
            self._finish_epoch(self._train(), began)
        if self.processes.first:
            if self.args.save_last:
                self._save_weights("last", self.model, self.log.rows[-1])
            write_report(self.folder)
            self._tell_best()
            self.log.close()
        self.recipe.remove_states()

    def _train(self) -> dict[str, float]:
        args, index = self.args, self.epoch - 1
        modeling.seed_everything(args.seed, self.epoch, self.processes.rank)
        if hasattr(self.train.sampler, "set_epoch"):
            self.train.sampler.set_epoch(args.seed * 100_003 + index)
        if args.mixup_off_epoch and index >= args.mixup_off_epoch:
            (self.mixup or self.train).mixup_enabled = False
        self.optimizer.zero_grad()
        found = train_one_epoch(
            self.wrapped,
            self.train,
            self.loss,
            self.mixup,
            args,
            self.processes,
            self.autocast,
            self.scaler,
            self._take_step,
            f"epoch {self.epoch}/{self.epochs}",
        )
        if self.epoch == self.epochs:
            before = self.recipe.updates()
            self.recipe.close(float(self.epoch))
            self._after_update(before)
        if args.dist_bn and self.processes.size > 1:
            distribute_bn(self.model, self.processes.size, args.dist_bn == "reduce")
        return found

    def _take_step(self) -> None:
        before = self.recipe.updates()
        self.recipe.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self._after_update(before)
        if self.ema is not None:
            self.ema.update(self.model, step=self.steps)
        self.schedule.after_step(self.steps)

    def _after_update(self, before: Any) -> None:
        if self.recipe.updates() == before:
            return
        masks = self.recipe.masks()
        epoch = self.epoch - 1 + (self.steps - (self.epoch - 1) * self.steps_per_epoch) / self.steps_per_epoch
        when = f"pruning update at step {self.steps}"
        named = {f"the mask of {name}": mask for name, mask in masks.items()}
        self.processes.check_equal(named | dict(self.model.named_parameters()), when)
        if self.processes.first:
            self.log.update(epoch, masks)

    def _finish_epoch(self, found: dict[str, float], began: float) -> None:
        masks = self.recipe.masks()
        row: dict[str, Any] = {"epoch": self.epoch, "steps": self.steps, "sparsity": zero_share(masks.values())}
        row |= {"train_loss": None, "lr": learning_rate(self.optimizer) if self.epoch else None} | found
        row |= measure(self.model, self.val, self.processes, self.autocast, "evaluate")
        if self.ema is not None:
            apply_masks(self.ema.module, masks)
            averaged = measure(self.ema.module, self.val, self.processes, self.autocast, "evaluate EMA")
            row |= {f"ema_{key}": value for key, value in averaged.items()}
        row["seconds"] = time.perf_counter() - began
        self.schedule.after_epoch(self.epoch, row["ema_top1" if self.ema else "top1"])
        if self.processes.first:
            self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        """Write all files of an epoch, ``last.pt`` last: after a kill in between, the repeated epoch writes the same files."""
        args, chosen = self.args, self.ema.module if self.ema else self.model
        score, level = row["ema_top1" if self.ema else "top1"], f"{row['sparsity']:.4f}"
        if self.epoch and (level not in self.best or score > self.best[level]["top1"]):
            self._save_weights(f"best_sparsity_{level}", chosen, row)
            self.best[level] = {"top1": score, "epoch": self.epoch}
        if self.epoch and args.checkpoint_freq > 0 and self.epoch % args.checkpoint_freq == 0:
            self._save_weights(f"epoch_{self.epoch}", self.model, row)
        self.log.epoch(row, self.model, self.recipe.masks())
        save_state(
            self.folder / "last.pt",
            {
                "epoch": self.epoch,
                "steps": self.steps,
                "model": self.model.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "scheduler": self.schedule.state_dict(),
                "manager": self.recipe.state_dict(),
                "best": self.best,
                "rows": self.log.rows,
                "updates": self.log.updates,
                "wandb_id": self.log.wandb_id,
                "arguments": training_resume.plain(args),
            }
            | self._surroundings(),
        )

    def _save_weights(self, name: str, model: nn.Module, row: dict[str, Any]) -> None:
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        facts = {key: row[key] for key in ("epoch", "sparsity", "top1")} | {"model": self.args.model}
        save_weights(path, model, self.recipe.masks(), facts)

    def _write_arguments(self) -> None:
        recipe = self.folder / "recipe.yaml"
        if Path(self.args.sparseml_recipe).resolve() != recipe.resolve():
            text = stored_text(self.args.sparseml_recipe)
            output.write_atomically(recipe, lambda partial: partial.write_text(text, encoding="utf-8"))
        output.write_atomically(
            self.folder / "arguments.yaml",
            lambda partial: partial.write_text(yaml.safe_dump(training_resume.plain(self.args)), encoding="utf-8"),
        )

    def _tell_best(self) -> None:
        rows = [{"sparsity": float(level), **facts} for level, facts in sorted(self.best.items())]
        for row in rows:
            row["sparsity"] *= 100
        print("\n" + output.table(rows, {"sparsity": "sparsity %", "top1": "best top-1 %", "epoch": "epoch"}))
        print(f"\nwritten to {self.folder}", flush=True)


def train(args: argparse.Namespace) -> None:
    """Train as ``args`` (see :mod:`capruner.vision.training_arguments`) say."""
    with (
        started(modeling.pick_device(args.device), args.timeout) as processes,
        output.new_folder(args.output, args.experiment) as folder,
    ):
        Training(args, processes, folder).run()


def main(argv: Sequence[str] | None = None) -> None:
    """Train as a command line says."""
    train(parse(argv))

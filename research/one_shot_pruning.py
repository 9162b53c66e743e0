#!/usr/bin/env python
"""Prune a timm model in one shot, at a whole list of sparsities, and say what each costs.

  python research/one_shot_pruning.py --data-dir DATA --model deit_small_patch16_224 --pretrained \\
      --sparseml-recipe research/recipes/one_shot/cap/vit.yaml --sparsities 0.5 0.75 0.9

DATA holds train/<class>/*.jpg and val/<class>/*.jpg. The recipe may use any SparseML pruning modifier: CAP and FastCAP serve the whole list from one
calibration, SparseML's own (OBSPruningModifier, MFACPruningModifier, GlobalMagnitudePruningModifier, ...) are applied anew at each sparsity.

Written to OUTPUT/EXPERIMENT: summary.json and summary.csv, accuracy_vs_sparsity.png, layer_sparsity.png, the recipe, result.safetensors (CAP, FastCAP), and
checkpoints/sparsity_0.75.safetensors, ... which timm.create_model(..., checkpoint_path=...) loads.
"""

from __future__ import annotations

import copy
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.utils import cli  # first: it sets what SparseML reads when it is imported

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import capruner
from capruner.sparseml.base import CorrelationAwareModifier
from research.utils import data as images
from research.utils import evaluate, modeling, output, plots, recipe

COLUMNS = {
    "method": "method",
    "requested": "sparsity",
    "reached_prunable": "of prunable",
    "reached_all": "of all",
    "top1": "top-1 %",
    "top1_bn": "top-1 % (BN)",
    "top5": "top-5 %",
    "loss": "loss",
    "seconds": "seconds",
    "peak_memory_gib": "peak GiB",
}


def parse(argv: Sequence[str] | None) -> Any:
    parser = cli.Parser(description=__doc__)
    what = parser.add_argument_group("what to prune")
    what.add_argument("--model", required=True, help="timm model name")
    what.add_argument(
        "--model-kwargs",
        nargs="*",
        action=cli.KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of timm.create_model, img_size=32 say",
    )
    what.add_argument("--checkpoint", default="", help="weights to start from (.safetensors or .pth)")
    what.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--sparseml-recipe", required=True, help="YAML with one pruning modifier; see research/recipes/one_shot"
    )
    how.add_argument(
        "--sparsities",
        type=float,
        nargs="*",
        default=[],
        help="shares of weights to remove, 0.5 0.9 say (default: the recipe's)",
    )
    how.add_argument(
        "--recalibrate-bn",
        type=int,
        default=0,
        metavar="N",
        help="also report accuracy after re-estimating BatchNorm statistics from N batches",
    )
    how.add_argument(
        "--gradients",
        choices=("batch", "sample"),
        help="CAP, FastCAP: one gradient from each batch or from each image (default: the recipe's)",
    )
    how.add_argument("--seed", type=int, default=42)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)")
    source = parser.add_argument_group("data")
    source.add_argument("--data-dir", required=True, help="folder with train/ and val/, or the root of --dataset")
    source.add_argument(
        "--dataset", default="", help="a data set that timm knows, torch/cifar10 say (default: image folders)"
    )
    source.add_argument("-gb", "--gs-batch-size", type=int, default=16, help="images per gradient (default 16)")
    source.add_argument(
        "--gs-aug", action="store_true", help="calibrate on augmented images (default: evaluation transforms)"
    )
    source.add_argument("-vb", "--val-batch-size", type=int, default=128, help="default 128")
    source.add_argument("--val-limit", type=int, help="evaluate on so many images only, the same each time")
    source.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    images.preprocessing_arguments(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output", default="output", help="parent folder (default ./output)")
    out.add_argument("--experiment", default="", help="name of the folder in it (default: model and recipe)")
    out.add_argument("--save-model", action="store_true", help="write a checkpoint per sparsity")
    out.add_argument(
        "--log-wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline needs no account)"
    )
    args = parser.parse_args(argv)
    wrong = [s for s in args.sparsities if not 0 <= s < 1]
    if wrong:
        raise cli.UserError(f"--sparsities {' '.join(map(str, wrong))}: must lie in [0, 1); write 0.9 for 90 %")
    if not args.experiment:
        args.experiment = f"{args.model}-{Path(args.sparseml_recipe).parent.name}-{Path(args.sparseml_recipe).stem}"
    return args


class Run:
    """One invocation: the dense model, its data, and the rows of the summary so far."""

    def __init__(self, args: Any, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.manager = recipe.load_manager(args.sparseml_recipe)  # kept: SparseML empties a manager that is collected
        self.modifier = recipe.pruning_modifier(self.manager, args.sparseml_recipe)
        if args.gradients:
            if not isinstance(self.modifier, CorrelationAwareModifier):
                raise cli.UserError(f"--gradients means nothing to {type(self.modifier).__name__}; leave it out")
            self.modifier.gradients = args.gradients
        self.device = modeling.pick_device(args.device)
        modeling.seed_everything(args.seed)
        self.model = modeling.build_model(args.model, args.model_kwargs, args.checkpoint, args.pretrained).to(
            self.device
        )
        self.names = recipe.selected_names(self.modifier, self.model)
        self.train, val = images.open_splits(args.data_dir, args.dataset, self.model)
        self.config = images.preprocessing(args, self.model)
        self.val = images.loader(val, self.config, args.val_batch_size, args.workers, limit=args.val_limit)
        recipe.check_sparsities(self.modifier, self.model, args.sparsities, args.sparseml_recipe)
        self.rows: list[dict[str, Any]] = []
        self.layers: dict[float, list[dict[str, Any]]] = {}
        self.wandb = self._wandb() if args.log_wandb else None
        shutil.copy(args.sparseml_recipe, folder / "recipe.yaml")

    def _wandb(self) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise cli.UserError("--log-wandb needs the wandb package: pip install wandb") from error
        return wandb.init(project="capruner", name=self.args.experiment, dir=str(self.folder), config=vars(self.args))

    @property
    def method(self) -> str:
        ours = {"cap": "CAP", "fast_cap": "FastCAP"}
        return ours.get(
            getattr(self.modifier, "method", ""), type(self.modifier).__name__.removesuffix("PruningModifier")
        )

    def grad_sampler(self, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        args = self.args
        batches = images.CalibrationBatches(
            self.train, self.config, args.gs_batch_size, args.workers, args.gs_aug, args.seed, self.device
        )
        return {"data_loader_builder": batches, "loss_function": loss}

    def record(self, model: nn.Module, requested: float | None, seconds: float, stages: dict[str, float]) -> None:
        """Measure a model, write its checkpoint, and bring the summary up to date."""
        weights = dict(model.named_parameters())
        zeros = {name: int((weights[name] == 0).sum()) for name in self.names}
        prunable = sum(weights[name].numel() for name in self.names)
        row: dict[str, Any] = {
            "method": "dense" if requested is None else self.method,
            "requested": requested,
            "reached_prunable": sum(zeros.values()) / prunable,
            "reached_all": sum(zeros.values()) / sum(p.numel() for p in weights.values()),
            **evaluate.evaluate(model, self.val, self.device),
            "seconds": seconds,
            **{f"seconds_{stage}": value for stage, value in stages.items()},
            "peak_memory_gib": peak_memory(self.device),
        }
        if requested is not None:
            self.layers[requested] = [
                {"name": n, "numel": weights[n].numel(), "zeros": zeros[n], "sparsity": zeros[n] / weights[n].numel()}
                for n in self.names
            ]
            self.save(model, f"sparsity_{requested:g}")
            if self.args.recalibrate_bn:
                self.recalibrate(model, row)
        self.rows.append(row)
        if self.wandb:
            self.wandb.log({key: value for key, value in row.items() if value is not None})
        self.write()

    def recalibrate(self, model: nn.Module, row: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(self.args.seed)
        loader = images.loader(
            self.train,
            self.config,
            self.args.val_batch_size,
            self.args.workers,
            shuffle=True,
            generator=generator,
        )
        if capruner.recalibrate_bn(model, loader, self.args.recalibrate_bn):
            again = evaluate.evaluate(model, self.val, self.device, "after BatchNorm recalibration")
            row |= {f"{key}_bn": again[key] for key in ("top1", "top5", "loss")}
            self.save(model, f"sparsity_{row['requested']:g}_bn")

    def save(self, model: nn.Module, name: str) -> None:
        if self.args.save_model:
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
            path = self.folder / "checkpoints" / f"{name}.safetensors"
            output.write_atomically(path, lambda partial: save_file(state, partial))

    def write(self) -> None:
        packages = ("capruner", "torch", "torchvision", "timm", "sparseml", "numpy")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        summary = {
            "arguments": vars(self.args),
            "recipe": (self.folder / "recipe.yaml").read_text(),
            "versions": versions,
            "device": str(self.device),
            "rows": self.rows,
            "layers": [{"requested": s, "layers": rows} for s, rows in self.layers.items()],
        }
        output.write_json(self.folder / "summary.json", summary)
        output.write_csv(self.folder / "summary.csv", self.rows)

    def finish(self) -> None:
        curve = [(row["requested"], row["top1"]) for row in self.rows[1:]]
        title = f"{self.args.model} pruned in one shot by {self.method}"
        plots.accuracy_vs_sparsity(
            self.folder / "accuracy_vs_sparsity.png", {self.method: curve}, self.rows[0]["top1"], title
        )
        plots.layer_sparsity(
            self.folder / "layer_sparsity.png",
            {self.method: self.layers},
            f"Weights removed from each layer by {self.method} (%)",
        )
        shown = {key: heading for key, heading in COLUMNS.items() if key != "top1_bn" or self.args.recalibrate_bn}
        percent = [
            row
            | {
                key: None if row[key] is None else round(100 * row[key], 3)
                for key in ("requested", "reached_prunable", "reached_all")
            }
            for row in self.rows
        ]
        print("\n" + output.table(percent, shown))
        print(f"\nwritten to {self.folder}")
        if self.wandb:
            self.wandb.finish()


def finite_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """For SparseML's own modifiers, which would prune on NaN without a word; ours check, and differentiate what has no branches."""
    loss = nn.functional.cross_entropy(outputs, labels)
    if not torch.isfinite(loss):
        raise ValueError(f"the calibration loss is {loss.item()}: look at the images, or at the checkpoint's weights")
    return loss


def peak_memory(device: torch.device) -> float:
    """High-water mark of this process in GiB: the GPU's allocations, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prune_by_one_calibration(run: Run) -> None:
    start = time.perf_counter()
    result = run.modifier.one_shot(run.model, run.args.sparsities, run.grad_sampler(nn.functional.cross_entropy))
    seconds = time.perf_counter() - start
    output.write_atomically(run.folder / "result.safetensors", result.save)
    for sparsity in result.sparsities:
        model = copy.deepcopy(run.model)
        result.apply(model, sparsity)
        run.record(model, sparsity, seconds, result.timings)
        asked, found = (
            sum(r["zeros"] for r in result.layer_report(sparsity)),
            sum(r["zeros"] for r in run.layers[sparsity]),
        )
        if found < asked:
            raise RuntimeError(f"{found} zeros in the model where the masks have {asked}: please report this")


def prune_anew_at_each(run: Run) -> None:
    wanted = run.args.sparsities or [run.modifier.final_sparsity]
    for sparsity in sorted(set(wanted)):
        model = copy.deepcopy(run.model)
        modeling.seed_everything(run.args.seed)
        start = time.perf_counter()
        recipe.apply_at(run.args.sparseml_recipe, model, sparsity, run.grad_sampler(finite_cross_entropy))
        run.record(model, sparsity, time.perf_counter() - start, {})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = output.make_folder(args.output, args.experiment)
    with output.emptied_on_error(folder):
        run = Run(args, folder)
    run.record(run.model, None, 0.0, {})
    dense = run.rows[0]
    print(f"dense: top-1 {dense['top1']:.2f} % of {dense['images']} images; {len(run.names)} layers to prune")
    prune = prune_by_one_calibration if isinstance(run.modifier, CorrelationAwareModifier) else prune_anew_at_each
    prune(run)
    run.finish()


if __name__ == "__main__":
    sys.exit(cli.run(main))

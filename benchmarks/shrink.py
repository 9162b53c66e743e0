"""Shrunk networks beside Torch-Pruning's at equal multiply-adds.

    python benchmarks/shrink.py DATA --model vit --units neurons heads --macs 0.7 0.5 0.4 --vit-weights VIT
    python benchmarks/shrink.py DATA --model efficientnet --units channels --macs 0.7 0.5 --bn-batches 4
    python benchmarks/shrink.py DATA --model conv --units channels --latency 0.667 0.5 --speed

All methods remove the same kinds of units and get the same gradients, one of each batch of 8 calibration images. Torch-Pruning ranks globally with its
defaults, and its ratio is bisected until its multiply-adds are at most ours. Needs ``pip install torch-pruning``.

``--speed`` times ours in torch, onnxruntime and OpenVINO (where it is installed) instead, one thread: CPU time of the fastest of calls in turns with the
dense network's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from accuracy import Batches, calibration
from cifar import accuracy, load_images, load_model, normalise
from torch import nn
from torch.nn import functional as F

import capruner
from capruner.deploy.engines import ENGINES
from capruner.deploy.export import to_onnx
from capruner.models.modes import eval_mode

METHODS = ("magnitude", "taylor", "obd")


def squares_and_means(model: nn.Module, batches: Batches, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """What Torch-Pruning's importances read from ``.grad``: the mean gradient, and the mean of its squares.

    Its own accumulation of squares (1.6.1) keeps the last gradient alone, so it is done here.
    """
    sums: dict[str, dict[str, torch.Tensor]] = {"taylor": {}, "obd": {}}
    parameters = dict(model.named_parameters())
    with eval_mode(model):
        for _, (x, y) in zip(range(count), batches):
            for name, g in zip(
                parameters, torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
            ):
                for method, value in (("taylor", g), ("obd", g.square())):
                    sums[method][name] = sums[method].get(name, 0) + value / count
    return sums


def by_torch_pruning(
    dense: nn.Module,
    method: str,
    gradients: dict[str, dict[str, torch.Tensor]],
    units: list[str],
    macs: float,
    x: torch.Tensor,
) -> nn.Module | None:
    """Torch-Pruning's model of ``macs`` multiply-adds at most, its ratio bisected; None where it does not reach that."""
    low, high, best = 0.0, 1.0, None
    for _ in range(9):
        ratio = (low + high) / 2
        model = torch_pruning_at(copy.deepcopy(dense), method, gradients.get(method, {}), units, ratio, x)
        if any(m.num_heads == 0 for m in model.modules() if hasattr(m, "num_heads")):
            high = ratio  # its ranking empties an attention, which then does not run
        elif multiply_adds(model, x) <= macs:
            best, high = model, ratio
        else:
            low = ratio
    return best


def torch_pruning_at(
    model: nn.Module, method: str, gradients: dict[str, torch.Tensor], units: list[str], ratio: float, x: torch.Tensor
) -> nn.Module:
    """Torch-Pruning at one ratio, with its defaults for everything that ``units`` leaves open."""
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone() if gradients else None
    importance = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "obd": torch_pruning.importance.GroupHessianImportance,
    }[method]()
    attentions = [m for m in model.modules() if hasattr(m, "qkv")]
    ignored = [m for name, m in model.named_modules() if name in ("patch_embed.proj", "head", "fc", "classifier")]
    if "neurons" not in units:
        ignored += [m.fc1 for m in model.modules() if hasattr(m, "fc1")]
    if "heads" not in units:
        ignored += [m.qkv for m in attentions]
    for attention in attentions:
        attention.fused_attn = False  # traced through its products
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads={m.qkv: m.num_heads for m in attentions},
            ignored_layers=ignored,
        )
        pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.num_heads * attention.head_dim
        attention.fused_attn = True
    model.zero_grad(set_to_none=True)
    return model


def shrink(dense: nn.Module, batches: Batches, args: argparse.Namespace, x: torch.Tensor, **target: float) -> nn.Module:
    """Ours."""
    return capruner.shrink(
        dense,
        batches,
        F.cross_entropy,
        example_inputs=x,
        units=args.units,
        multiple_of=args.multiple_of,
        num_grads=args.images // 8,
        progress=False,
        **target,
    ).model.eval()


def engines(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    """A network in torch, onnxruntime and, where it is installed, OpenVINO, one thread each."""
    made: dict[str, Callable[[torch.Tensor], Any]] = {"torch": torch.inference_mode()(model)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        to_onnx(model, file, tuple(x.shape[1:]))
        job = {"file": str(file), "batch": len(x), "shape": x.shape[1:], "threads": 1, "options": {}}
        for name in ("onnxruntime", "openvino"):
            with contextlib.suppress(ModuleNotFoundError):
                engine = ENGINES[name](job)
                made[name] = lambda x, engine=engine: engine(x.numpy())
    return made


def speed_up(calls: list[Callable[[torch.Tensor], Any]], x: torch.Tensor, count: int = 40) -> str:
    """CPU time of the dense and the small network in one engine, the fastest of calls in turns."""
    times: list[list[float]] = [[], []]
    for _ in range(count):
        for taken, call in zip(times, calls):
            start = time.process_time()
            call(x)
            taken.append(time.process_time() - start)
    dense, small = map(min, times)
    return f"{1e3 * dense:.2f} -> {1e3 * small:.2f} ms, {dense / small:.2f}x"


@dataclass(frozen=True)
class Setting:
    """The dense network and the images that all of a run share."""

    args: argparse.Namespace
    dense: nn.Module
    macs: int
    images: torch.Tensor
    labels: torch.Tensor

    def inputs(self, count: int) -> torch.Tensor:
        return normalise(self.images[:count], self.args.model)

    def top1(self, model: nn.Module) -> float:
        return accuracy(model, self.images, self.labels, self.args.model)

    def share(self, model: nn.Module) -> float:
        """Of the dense network's multiply-adds."""
        return multiply_adds(model, self.inputs(1)) / self.macs

    def line(self, model: nn.Module, wide: Batches) -> str:
        """What a smaller network costs and is worth; it is changed by ``--bn-batches`` and ``--distill``."""
        text = f"{self.share(model):.1%} of multiply-adds, {sum(p.numel() for p in model.parameters()):,} weights, "
        text += f"top-1 {self.top1(model):.2f}"
        if self.args.bn_batches and capruner.recalibrate_bn(model, wide, self.args.bn_batches):
            text += f", BatchNorm re-estimated {self.top1(model):.2f}"
        if self.args.distill:
            capruner.distill(model, self.dense, wide, passes=self.args.distill, progress=False)
            text += f", distilled {self.top1(model):.2f}"
        return text


def multiply_adds(model: nn.Module, x: torch.Tensor) -> int:
    return capruner.multiply_adds(model, x.shape[1:]).dense


def compare(setting: Setting, batches: Batches, wide: Batches, seed: int) -> None:
    """Ours beside Torch-Pruning's at equal multiply-adds."""
    args, dense, x = setting.args, setting.dense, setting.inputs(2)
    gradients = squares_and_means(dense, batches, args.images // 8)
    for share in args.macs:
        small = shrink(dense, batches, args, x, macs=share)
        goal = multiply_adds(small, x)
        for method in ("capruner", *METHODS):
            model: nn.Module | None = small
            if method != "capruner":
                model = by_torch_pruning(dense, method, gradients, args.units, goal, x)
            said = "not reached" if model is None else setting.line(model.eval(), wide)
            print(f"seed {seed}, macs {share:.0%}, {method:<9} {said}", flush=True)


def time_engines(setting: Setting, batches: Batches, wide: Batches) -> None:
    """Ours, shrunk to a share of the multiply-adds or of the time, in several engines."""
    args, x = setting.args, setting.inputs(8)
    targets = [{"latency": v} for v in args.latency] if args.latency else [{"macs": v} for v in args.macs]
    for target in targets:
        small = shrink(setting.dense, batches, args, x, **target)
        print(*target, *target.values(), setting.line(small, wide), flush=True)
        for batch in (1, 8):
            images = setting.inputs(batch)
            made = [engines(model.eval(), images) for model in (setting.dense, small)]
            for engine in made[1]:
                print(f"  batch {batch}, {engine}: {speed_up([m[engine] for m in made], images)}", flush=True)


def run(args: argparse.Namespace) -> None:
    if args.speed:
        torch.set_num_threads(1)
    train, val = (load_images(args.data, split, args.cache) for split in ("train", "val"))
    images, labels = (t[: args.limit] for t in val)
    dense = load_model(args.model, args.vit_weights if args.model == "vit" else None)
    setting = Setting(args, dense, multiply_adds(dense, normalise(images[:1], args.model)), images, labels)
    what = f"{args.model}, {' '.join(args.units)}"
    print(f"{what}: dense {setting.top1(dense):.2f}, {setting.macs:,} multiply-adds", flush=True)
    for seed in args.seeds:
        case = {"seed": seed, "images": args.images, "batch": 8, "classes": 10, "model": args.model}
        batches = calibration(train, case)
        wide = Batches(batches.images, batches.labels, 256, args.model)
        if args.speed:
            time_engines(setting, batches, wide)
        else:
            compare(setting, batches, wide, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit", choices=("vit", "conv", "efficientnet"))
    parser.add_argument("--units", nargs="+", default=["neurons", "heads"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--multiple-of", type=int, default=8, help="of channels, for ours (default 8)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=4096, help="calibration images")
    parser.add_argument("--limit", type=int, default=2000, help="validation images")
    parser.add_argument(
        "--bn-batches", type=int, default=0, help="also re-estimate BatchNorm statistics from N batches of 256"
    )
    parser.add_argument("--distill", type=float, default=0, help="passes of distillation afterwards, reported apart")
    parser.add_argument("--speed", action="store_true", help="time ours instead of comparing accuracies")
    parser.add_argument(
        "--latency", nargs="+", type=float, help="--speed: shares of the time of 8 images in torch, instead of --macs"
    )
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of the ViT when they are not in benchmarks/models")
    run(parser.parse_args())


if __name__ == "__main__":
    main()

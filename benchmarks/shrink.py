"""Shrunk networks beside Torch-Pruning's at equal multiply-adds.

    python benchmarks/shrink.py DATA --model vit --units neurons heads --macs 0.7 0.5 0.4 --vit-weights VIT
    python benchmarks/shrink.py DATA --model conv --units channels --macs 0.7 0.5 0.35 --bn-batches 8

All methods remove the same kinds of units and get the same gradients, one of each batch of 8 calibration images. Torch-Pruning ranks globally with its
defaults, and its ratio is bisected until its multiply-adds are at most ours. Needs ``pip install torch-pruning``.

``--speed`` times ours in torch and onnxruntime instead, one thread: CPU time of the fastest of calls in turns with the dense network's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from accuracy import Batches, calibration
from cifar import accuracy, load_images, load_model, normalise
from torch import nn
from torch.nn import functional as F

import capruner
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
        elif capruner.multiply_adds(model, x.shape[1:]).dense <= macs:
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
    ignored = [m for name, m in model.named_modules() if name in ("patch_embed.proj", "head", "fc")]
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


def engines(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, Callable[[torch.Tensor], Any]]:
    """A network in torch and in onnxruntime, one thread each."""
    from onnxruntime import InferenceSession, SessionOptions

    from capruner.deploy.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        to_onnx(model, file, input_size)
        options = SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return {"torch": torch.inference_mode()(model), "onnxruntime": lambda x: session.run(None, {name: x.numpy()})}


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


def compare(args: argparse.Namespace) -> None:
    train, val = (load_images(args.data, split, args.cache) for split in ("train", "val"))
    images, labels = (t[: args.limit] for t in val)
    dense = load_model(args.model, args.vit_weights if args.model == "vit" else None)
    x = normalise(images[:2], args.model)
    macs = capruner.multiply_adds(dense, x.shape[1:]).dense
    print(
        f"{args.model}, {' '.join(args.units)}: dense {accuracy(dense, images, labels, args.model):.2f}, {macs:,} multiply-adds",
        flush=True,
    )
    for seed in args.seeds:
        case = {"seed": seed, "images": args.images, "batch": 8, "classes": 10, "model": args.model}
        batches = calibration(train, case)
        wide = Batches(batches.images, batches.labels, 256, args.model)
        gradients = squares_and_means(dense, batches, args.images // 8)
        for share in args.macs:
            small = capruner.shrink(
                dense,
                batches,
                F.cross_entropy,
                macs=share,
                example_inputs=x,
                units=args.units,
                num_grads=args.images // 8,
                progress=False,
            ).model
            if args.speed:
                print(f"macs {share:.0%}, top-1 {accuracy(small, images, labels, args.model):.2f}", flush=True)
                made = [engines(model.eval(), tuple(x.shape[1:])) for model in (dense, small)]
                for batch, engine in itertools.product((1, 8), made[0]):
                    batch_images = normalise(images[:batch], args.model)
                    print(f"  batch {batch}, {engine}: {speed_up([m[engine] for m in made], batch_images)}", flush=True)
                continue
            goal = capruner.multiply_adds(small, x.shape[1:]).dense
            for method in ("capruner", *METHODS):
                model = small
                if method != "capruner":
                    model = by_torch_pruning(dense, method, gradients, args.units, goal, x)
                if model is None:
                    print(f"seed {seed}, macs {share:.0%}, {method}: not reached", flush=True)
                    continue
                model.eval()
                line = f"seed {seed}, macs {share:.0%}, {method:<9} {capruner.multiply_adds(model, x.shape[1:]).dense / macs:.1%} of multiply-adds, "
                line += f"{sum(p.numel() for p in model.parameters()):,} weights, top-1 {accuracy(model, images, labels, args.model):.2f}"
                if args.bn_batches and capruner.recalibrate_bn(model, wide, args.bn_batches):
                    line += f", BatchNorm re-estimated {accuracy(model, images, labels, args.model):.2f}"
                if args.distill:
                    capruner.distill(model, dense, wide, passes=args.distill, progress=False)
                    line += f", distilled {accuracy(model, images, labels, args.model):.2f}"
                print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit", choices=("vit", "conv"))
    parser.add_argument("--units", nargs="+", default=["neurons", "heads"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=4096, help="calibration images")
    parser.add_argument("--limit", type=int, default=2000, help="validation images")
    parser.add_argument(
        "--bn-batches", type=int, default=0, help="also re-estimate BatchNorm statistics from N batches of 256"
    )
    parser.add_argument("--distill", type=float, default=0, help="passes of distillation afterwards, reported apart")
    parser.add_argument("--speed", action="store_true", help="time ours instead of comparing accuracies")
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of the ViT when they are not in benchmarks/models")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()

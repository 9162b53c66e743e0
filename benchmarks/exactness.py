"""What speed costs in accuracy: our float32 masks against the textbook's in float64, from the same gradients.

    python benchmarks/exactness.py                       # the demo's model and digits, 4,096 gradients, damp 1e-8; some minutes
    python benchmarks/exactness.py --num-grads 512 --block-size 96

The textbook: ``F = GᵀG / m + λI`` and its inverse in float64, greedy OBS that rewrites all of ``H`` at each step, one threshold on the running maximum of a
block's losses. Digits are turned and shifted a little, as in training, so that there are as many different images as gradients.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import timm
import torch
from textbook import eliminate_with_traces
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.batches import Batches
from capruner.calibration.gradients import gradient_slabs
from capruner.calibration.stream import CalibrationStream
from capruner.core.blocks import BlockLayout
from capruner.models.modes import eval_mode
from capruner.models.selection import select_parameters

sys.path.insert(0, str(Path(__file__).parents[1]))
from research.demo.digits import MODEL, MODEL_KWARGS, WEIGHTS, write_folders
from research.demo.train_digits_vit import moved, tensors

SPARSITIES = [0.5, 0.75, 0.9, 0.95]
PARAMS = ["re:blocks.[0-9]+.(attn|mlp).*weight$"]


def textbook_masks(model: nn.Module, data: list, args: argparse.Namespace) -> dict[float, Tensor]:
    """Bool over all blocks of all layers, True = stays, per sparsity."""
    parameters = select_parameters(model, PARAMS)
    B = args.block_size
    layouts = {name: BlockLayout.of(p.shape, B) for name, p in parameters.items()}
    fisher = {n: torch.zeros(layout.num_blocks, B, B, dtype=torch.float64) for n, layout in layouts.items()}
    stream = CalibrationStream(Batches(data), torch.device("cpu"))
    with eval_mode(model):
        for slab in gradient_slabs(model, stream, F.cross_entropy, parameters, args.num_grads, mode="sample", slab=64):
            for name, rows in slab.items():
                G = layouts[name].to_blocks(rows, torch.float64).transpose(0, 1)
                fisher[name].baddbmm_(G.mT, G, alpha=1 / args.num_grads)
    orders, losses = [], []
    for name, blocks in fisher.items():
        blocks.diagonal(dim1=1, dim2=2).add_(args.damp)
        w = layouts[name].to_blocks(parameters[name].detach()[None], torch.float64)[0]
        for part, weights in zip(blocks.split(64), w.split(64), strict=True):
            order, loss, _ = eliminate_with_traces(weights, torch.linalg.inv(part))
            orders.append(order)
            losses.append(loss.cummax(dim=1).values)
    order, loss = torch.cat(orders), torch.cat(losses)
    masks = {}
    for sparsity in SPARSITIES:
        chosen = loss.flatten().argsort(stable=True)[: round(sparsity * loss.numel())]
        taken = torch.zeros(loss.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view_as(loss)
        masks[sparsity] = torch.ones_like(taken).scatter_(1, order, ~taken)
    return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-grads", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=128, help="has to divide the layers (default 128)")
    parser.add_argument("--damp", type=float, default=1e-8)
    args = parser.parse_args()
    model = timm.create_model(MODEL, checkpoint_path=str(WEIGHTS), **MODEL_KWARGS).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        images, labels = tensors(Path(folder) / "train")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(images), (args.num_grads,), generator=generator)
    images, labels = moved(images[chosen], generator), labels[chosen]
    data = list(zip(images.split(64), labels.split(64), strict=True))
    result = capruner.prune(
        model,
        data,
        F.cross_entropy,
        SPARSITIES,
        params=PARAMS,
        num_grads=args.num_grads,
        gradients="sample",
        fisher_block_size=args.block_size,
        damp=args.damp,
    )
    expected = textbook_masks(model, data, args)
    for sparsity, mask in expected.items():
        ours = torch.cat([m.reshape(-1, args.block_size) for m in result.masks(sparsity).values()])
        same = (ours == mask).double().mean()
        print(f"{100 * sparsity:g} %: {100 * float(same):.4f} % of {mask.numel():,} mask entries are the textbook's")


if __name__ == "__main__":
    main()

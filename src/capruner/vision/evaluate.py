"""Accuracy on a split, every image counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from capruner.models.modes import eval_mode


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, name: str = "evaluate"
) -> dict[str, float]:
    """``{"top1": %, "top5": %, "loss": mean cross-entropy, "images": count}``, in eval mode."""
    top1 = top5 = count = 0
    loss = 0.0
    with eval_mode(model), torch.inference_mode():
        for images, labels in tqdm(batches, desc=name, leave=False, disable=None):
            images, labels = images.to(device), labels.to(device)
            outputs = model(images).float()
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
            ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == labels[:, None]
            top1 += int(ranked[:, 0].sum())
            top5 += int(ranked.any(dim=1).sum())
            count += len(labels)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "images": count}

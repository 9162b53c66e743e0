"""Accuracy of exported files beside that of the model they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from capruner.deploy import mnn
from capruner.deploy.engines import load_onnxruntime
from capruner.deploy.export import Outputs


@dataclass(frozen=True)
class Accuracy:
    """Several forms of a model on the same images.

    Attributes:
        images: their number.
        top1: accuracy in %, by form.
        agreement: fraction in % of images of which a form and the first one predict the same class.
    """

    images: int
    top1: dict[str, float]
    agreement: dict[str, float]


def measure(forms: Mapping[str, Outputs], batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Evaluate every form on every batch of ``(images, labels)``; the first form is the reference."""
    right, equal = dict.fromkeys(forms, 0), dict.fromkeys(forms, 0)
    count = 0
    for images, labels in batches:
        predictions = {name: np.asarray(form(images.numpy())).argmax(axis=1) for name, form in forms.items()}
        reference = next(iter(predictions.values()))
        for name, predicted in predictions.items():
            right[name] += int((predicted == labels.numpy()).sum())
            equal[name] += int((predicted == reference).sum())
        count += len(labels)
    return Accuracy(
        count, {n: 100 * r / count for n, r in right.items()}, {n: 100 * e / count for n, e in equal.items()}
    )


def outputs(form: nn.Module | Path) -> Outputs:
    """A function from images to outputs that runs a model, an ONNX file or an MNN file."""
    threads = torch.get_num_threads()
    if isinstance(form, Path):
        return (
            mnn.load(form, threads)
            if form.suffix == ".mnn"
            else load_onnxruntime({"file": str(form), "threads": threads})
        )
    model = form.eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run

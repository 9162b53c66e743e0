"""What the scripts leave in a folder, and what a checkpoint says by itself, as the contents of a report."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from capruner.deploy.sparse_file import FORMAT as SPARSE_FORMAT
from capruner.deploy.sparse_file import sparse_bytes
from capruner.files import read_header, replacing
from capruner.models.macs import MultiplyAdds
from capruner.models.selection import select_parameters
from capruner.report.architecture import architecture, architecture_macs
from capruner.report.checkpoint import read_weights
from capruner.report.contents import RANDOM_WEIGHTS, Contents, Measurement
from capruner.report.document import given
from capruner.report.page import page
from capruner.rows import weight_rows
from capruner.text import printable

FILES = {
    "summary.json": "all numbers (JSON)",
    "summary.csv": "a row per sparsity or epoch (CSV)",
    "layer_sparsity.json": "sparsity of each layer (JSON)",
    "result.safetensors": "masks and weights of all sparsities (capruner.load_result)",
    "recipe.yaml": "the recipe",
    "arguments.yaml": "the arguments",
    "accuracy_vs_sparsity.png": "accuracy against sparsity (PNG)",
    "layer_sparsity.png": "sparsity by layer (PNG)",
    "training.png": "training curves (PNG)",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of an experiment and return its path; raise ``ValueError`` if the folder has no results."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (folder / "summary.json").is_file():
        contents = one_shot_contents(folder)
    elif (folder / "summary.csv").is_file() and (folder / "arguments.yaml").is_file():
        contents = training_contents(folder)
    else:
        raise ValueError(
            f"{folder} holds no summary.json (of one-shot pruning), and no summary.csv with arguments.yaml (of sparse training); "
            "give the folder that a script calls 'written to', or a checkpoint with --model"
        )
    return write_page(contents, folder / "report.html")


def write_page(contents: Contents, path: Path) -> Path:
    """The page, in one step; ``path``."""
    with _edited(f"the page {path.name} cannot be made: {contents.title} holds values that no script writes"):
        text = printable(page(contents))
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


@contextmanager
def _edited(what: str) -> Iterator[None]:
    """Whatever a file that was edited, or cut off, makes the report stumble over, as a mistake in that file."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(repr(error).split())[:300]}") from error


def percent(share: float) -> str:
    """0.75 as "75 %", 0.9375 as "93.75 %"."""
    return f"{100 * share:.4g} %"


def one_shot_contents(folder: Path) -> Contents:
    """From ``summary.json``; what an older one lacks is computed from the architecture, or noted."""
    with _edited(f"{folder / 'summary.json'} is not what one-shot pruning writes"):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return _one_shot(folder, summary, summary["arguments"])


def _one_shot(folder: Path, summary: Mapping[str, Any], arguments: Mapping[str, Any]) -> Contents:
    layers = {entry["requested"]: entry["layers"] for entry in summary["layers"]}
    levels = []
    for row in summary["rows"]:
        requested = row["requested"]
        there = layers.get(requested, [])
        level = Measurement(
            name="dense" if requested is None else percent(requested),
            requested=requested,
            prunable=row["reached_prunable"],
            overall=row["reached_all"],
            predicted=row.get("predicted_loss"),
            divergence=row.get("divergence"),
            macs=row.get("macs_left"),
            layers=there,
            **{key: row.get(key) for key in ("top1", "top1_bn", "top5", "loss")},
        )
        if requested is not None:
            for suffix, text in (("", "checkpoint"), ("_bn", "checkpoint, BatchNorm recalibrated")):
                file = Path("checkpoints") / f"sparsity_{requested:g}{suffix}.safetensors"
                if (folder / file).is_file():
                    level.checkpoints.append((text, link(file)))
        levels.append(level)
    pruned = [row for row in summary["rows"] if row["requested"] is not None]
    method = pruned[0]["method"] if pruned else "nothing"
    contents = Contents(
        title=f"{arguments['model']} pruned in one shot by {method}",
        model=arguments["model"],
        levels=levels,
        search=summary.get("search"),
        stages=summary.get("stages") or _stages(pruned),
        facts=given(arguments) | {"device": summary.get("device")},
        recipe=summary.get("recipe", ""),
        versions=summary.get("versions", {}),
        files=_files(folder),
    )
    images = next((row["images"] for row in summary["rows"] if row.get("images")), None)
    if images:
        contents.notes.append(f"Accuracy and loss are those of {images:,} validation images.")
    if arguments.get("checkpoint") == "" and not arguments.get("pretrained"):
        contents.notes.append(RANDOM_WEIGHTS)
    if "macs" in summary:
        macs = MultiplyAdds(**summary["macs"])
        _put_macs(contents, macs)
    else:
        _count_macs(contents, arguments.get("model_kwargs") or {}, arguments.get("img_size"))
    return contents


def _stages(pruned: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The little that summaries without stages know: one calibration for all rows, with its parts."""
    if not pruned or not any(key.startswith("seconds_") for key in pruned[0]):
        return [{"stage": f"prune to {percent(row['requested'])}", "seconds": row["seconds"]} for row in pruned]
    parts = {k.removeprefix("seconds_"): v for k, v in pruned[0].items() if k.startswith("seconds_") and v is not None}
    return [{"stage": "calibrate and prune", "seconds": pruned[0]["seconds"], "parts": parts}]


def training_contents(folder: Path) -> Contents:
    """From what ``sparse_training.py`` writes: a level for each sparsity that was trained at, with its best epoch."""
    import yaml

    with _edited(f"{folder} is not what sparse training writes"):
        arguments = yaml.safe_load((folder / "arguments.yaml").read_text(encoding="utf-8"))
        with (folder / "summary.csv").open(encoding="utf-8") as file:
            epochs = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
        updates = json.loads((folder / "layer_sparsity.json").read_text(encoding="utf-8"))
        return _training(folder, arguments, epochs, updates)


def _training(
    folder: Path, arguments: Mapping[str, Any], epochs: list[dict[str, Any]], updates: Sequence[Mapping[str, Any]]
) -> Contents:
    kwargs = arguments.get("model_kwargs") or {}
    recipe = folder / "recipe.yaml"
    method = Path(str(arguments["sparseml_recipe"])).stem
    contents = Contents(
        title=f"{arguments['model']} trained sparse by {method}",
        model=arguments["model"],
        levels=[],
        epochs=epochs,
        facts=given(arguments),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        files=_files(folder),
    )
    first, trained = epochs[0], epochs[1:]
    contents.levels.append(
        Measurement("before training", None, first["sparsity"], 0.0, top1=first["top1"], loss=first["loss"])
    )
    contents.stages.append({"stage": "evaluate before training", "seconds": first["seconds"]})
    contents.stages.append({"stage": f"{len(trained)} epochs", "seconds": sum(row["seconds"] for row in trained)})
    total = sum(p.numel() for p in architecture(contents.model, kwargs).parameters())
    score = "ema_top1" if first.get("ema_top1") is not None else "top1"
    for sparsity in sorted({row["sparsity"] for row in trained}):
        best = max((row for row in trained if row["sparsity"] == sparsity), key=lambda row: row[score])
        update = min(updates, key=lambda one: abs(one["sparsity"] - sparsity), default=None)
        layers = update["layers"] if update and abs(update["sparsity"] - sparsity) < 1e-6 else []
        level = Measurement(
            percent(sparsity), sparsity, sparsity, sum(row["zeros"] for row in layers) / total, layers=layers
        )
        kind = score.removesuffix("top1")
        level.top1, level.top5, level.loss = (best.get(kind + key) for key in ("top1", "top5", "loss"))
        file = Path("checkpoints") / f"best_sparsity_{sparsity:.4f}.safetensors"
        if (folder / file).is_file():
            level.checkpoints.append((f"epoch {best['epoch']:.0f}", link(file)))
        contents.levels.append(level)
    contents.notes.append(
        f"Each sparsity stands for its best epoch{' (of the moving average)' * (score == 'ema_top1')}; all epochs are below."
    )
    _count_macs(contents, kwargs, arguments.get("img_size"))
    return contents


def checkpoint_contents(
    path: Path, model: str, kwargs: Mapping[str, Any], params: Sequence[str], page_folder: Path
) -> Contents:
    """From weights alone, and the architecture's name; raise ``ValueError`` if they do not fit it."""
    module = architecture(model, kwargs)
    weights = read_weights(path)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    unfit = [name for name, shape in shapes.items() if name not in weights or tuple(weights[name].shape) != shape]
    if unfit:
        raise ValueError(
            f"{path} holds no weights of {model}{f' with --model-kwargs {dict(kwargs)}' if kwargs else ''}: "
            f"{', '.join(unfit[:3])} missing or of another shape"
        )
    rows = weight_rows(weights, select_parameters(module, params, trainable=False))
    zeros = sum(row["zeros"] for row in rows)
    share = zeros / sum(row["numel"] for row in rows)
    level = Measurement(
        percent(share), share, share, zeros / sum(weights[name].numel() for name in shapes), layers=rows
    )
    facts = checkpoint_facts(path) | {"size": _sizes(weights)}
    level.top1 = facts.get("top1")
    level.checkpoints = [(path.name, link(Path(os.path.relpath(path.resolve(), page_folder.resolve()))))]
    prunable = (
        "the weights of all linear, convolution, attention and recurrent layers"
        if list(params) == ["__ALL_PRUNABLE__"]
        else ", ".join(params)
    )
    known = {"checkpoint": path.name, "model": model, "model_kwargs": dict(kwargs), "prunable": prunable}
    contents = Contents(f"{path.name}: {model}", model, [level], facts=given(known | facts))
    contents.notes.append(f"Read from the checkpoint alone; prunable are {prunable}.")
    _count_macs(contents, kwargs, None)
    return contents


def _sizes(weights: Mapping[str, Tensor]) -> str:
    """Bytes of the weights, dense and as :func:`capruner.save_sparse` stores them."""
    dense = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    sizes = [dense, sparse_bytes(weights), sparse_bytes(weights, half=True)]
    return "{:.2f} MiB dense, {:.2f} MiB as bit mask and values, {:.2f} MiB with values in float16".format(
        *(size / 2**20 for size in sizes)
    )


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Facts that capruner wrote into the header of a safetensors file; empty for other files."""
    header = read_header(path)
    return header["facts"] if header.get("format") == SPARSE_FORMAT else header


def _count_macs(contents: Contents, kwargs: Mapping[str, Any], img_size: int | None) -> None:
    try:
        macs = architecture_macs(architecture(contents.model, kwargs), img_size)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        contents.notes.append(f"Multiply-adds are not counted: {error}.")
        return
    _put_macs(contents, macs)


def _put_macs(contents: Contents, macs: MultiplyAdds) -> None:
    contents.macs_dense, contents.macs_fixed = macs.dense, macs.activations
    contents.macs_input = tuple(macs.input_size)
    for level in contents.levels:
        if level.macs is None and (level.layers or not level.requested):
            level.macs = macs.left({row["name"]: row["sparsity"] for row in level.layers})


def _files(folder: Path) -> list[tuple[str, str]]:
    return [(text, link(Path(name))) for name, text in FILES.items() if (folder / name).is_file()]


def link(path: Path) -> str:
    """A relative path as a URL."""
    return quote(path.as_posix())

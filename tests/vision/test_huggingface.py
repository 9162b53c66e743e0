"""Image classifiers of transformers in the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import Line

pytest.importorskip("timm")
from capruner.cli.arguments import UserError
from capruner.vision import huggingface, one_shot_pruning

NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 16, "width": 24}, "resample": 2}, ((3, 16, 24), 1.0, "squash", "bilinear")),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True},
            ((3, 28, 28), 0.875, "center", "bilinear"),
        ),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 3}, ((3, 28, 28), 0.875, "center", "bicubic")),
        ({"size": 48, "crop_size": 40, "do_center_crop": False}, ((3, 48, 48), 1.0, "center", "bilinear")),
    ],
)
def test_preprocessing_is_the_image_processor_s(processor: dict[str, Any], expected: Any) -> None:
    found = huggingface.preprocessing("hf:x", processor | NORMAL, object())
    assert (found["input_size"], found["crop_pct"], found["crop_mode"], found["interpolation"]) == expected
    assert (found["mean"], found["std"]) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert huggingface.preprocessing("hf:x", processor | {"do_normalize": False}, object())["std"] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="scales pixels by"):
        huggingface.preprocessing("hf:x", processor | NORMAL | {"rescale_factor": 0.5}, object())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    place = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(place)
    processor = {"size": {"height": 16, "width": 16}, "image_processor_type": "ViTImageProcessor"} | NORMAL
    (place / huggingface.PROCESSOR).write_text(json.dumps(processor))
    return place


@pytest.mark.filterwarnings("ignore")
def test_pruned_evaluated_and_saved_for_from_pretrained(folder: Path, line: Line, tmp_path: Path) -> None:
    import transformers

    nothing = dict.fromkeys(("batch_size", "opt", "lr", "model_kwargs", "sparseml_recipe", "random_weights"))
    flags = nothing | {"model": f"hf:{folder}", "num_grads": 6, "fisher_block_size": 16, "damp": 1e-4}
    one_shot_pruning.main(line(**flags, sparsities=[0.5], params="__BLOCKS__", save_model=True))
    done = tmp_path / "trial"
    rows = json.loads((done / "summary.json").read_text())["rows"]
    assert rows[1]["reached_prunable"] == pytest.approx(0.5, abs=1e-3)
    saved = done / "checkpoints" / "sparsity_0.5"
    model = transformers.AutoModelForImageClassification.from_pretrained(saved)
    assert type(model).__name__ == "ViTForImageClassification"
    original = transformers.AutoModelForImageClassification.from_pretrained(folder)
    inside = [w for name, w in model.named_parameters() if "encoder" in name or "layer" in name]
    weights = [w for w in inside if w.dim() == 2]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.5 * sum(w.numel() for w in weights))
    assert torch.equal(model.classifier.weight, original.classifier.weight)
    again = huggingface.build(f"hf:{saved}", {}, pretrained=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(images), model(pixel_values=images).logits)
    assert again.pretrained_cfg == huggingface.build(f"hf:{folder}", {}).pretrained_cfg


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_classifier_is_one_line(folder: Path, line: Line) -> None:
    (folder / huggingface.PROCESSOR).unlink()
    flags = dict.fromkeys(("batch_size", "opt", "lr", "model_kwargs", "sparseml_recipe", "random_weights"))
    for name in (f"hf:{folder}", f"hf:{folder}/nowhere"):
        with pytest.raises(UserError, match="no such image classifier with an image processor"):
            one_shot_pruning.main(line(**flags, model=name))

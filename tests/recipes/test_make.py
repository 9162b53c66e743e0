"""Recipes made for a model, and the weights of its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from capruner import recipes
from capruner.cli.main import main
from capruner.models.selection import SelectionError, select_parameters
from capruner.recipes import catalog
from capruner.recipes.make import make, patterns

pytest.importorskip("timm")
from capruner.report.architecture import architecture

SHIPPED = {
    "vit": "deit_small_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "resnet50d": "resnet50d",
    "convnext": "convnext_tiny",
    "efficientnet": "efficientnet_b0",
}
OTHERS = {
    "regnety_002": ("stem", "head.fc"),
    "mobilenetv4_conv_small": ("conv_stem", "classifier"),
    "efficientvit_b0": ("stem", "head.classifier.4"),
    "levit_128s": ("stem", "head"),
    "mixer_s32_224": ("stem.proj", "head"),
    "resnet18": ("conv1", "fc"),
    "resnetv2_50": ("stem.conv", "head.fc"),
    "densenet121": ("features.conv0", "classifier"),
    "pvt_v2_b0": ("patch_embed", "head"),
    "maxvit_pico_rw_256": ("stem", "head.fc"),
}


@pytest.mark.parametrize("family", SHIPPED)
def test_blocks_are_what_the_shipped_recipes_prune(family: str) -> None:
    model = architecture(SHIPPED[family], {})
    recipe = recipes.load(catalog.find(f"one_shot/cap/{family}"))
    assert list(recipe.selected(model)) == list(select_parameters(model, "__BLOCKS__"))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("epochs", [None, 10])
def test_a_recipe_for_any_model(name: str, epochs: int | None, tmp_path: Path) -> None:
    model = architecture(name, {})
    path = tmp_path / "made.yaml"
    path.write_text(make(model, name, sparsity=0.75, epochs=epochs))
    if epochs:
        recipe = recipes.load_training(path)
        assert recipe.epochs == 10
        assert recipe.pruning[0].epochs() == pytest.approx(range(9))
        chosen = recipe.pruning[0].one_shot.selected(model)
    else:
        chosen = recipes.load(path).selected(model)
    assert list(chosen) == list(select_parameters(model, "__BLOCKS__"))
    dense = set(select_parameters(model, "__ALL_PRUNABLE__")) - set(chosen)
    stem, head = OTHERS[name]
    assert all(other.startswith((stem, head)) for other in dense)
    assert {True} == {any(other.startswith(part) for other in dense) for part in (stem, head)}
    assert sum(p.numel() for p in chosen.values()) > 0.5 * sum(p.numel() for p in model.parameters())


def test_a_model_without_a_configuration() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert list(select_parameters(model, "__BLOCKS__")) == ["2.weight", "3.weight"]
    with pytest.raises(SelectionError, match=r"holds nothing but stem and head: 0\.weight, 1\.weight"):
        select_parameters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "__BLOCKS__")


def test_patterns_stand_for_nothing_else() -> None:
    names = ["blocks.0.fc1.w", "blocks.0.fc2.w", "blocks.11.fc1.w", "blocks.11.fc2.w", "fc3.w", "stem.w"]
    assert patterns(names[:4], names) == ["re:blocks.[0-9]+.fc[0-9]+.w$"]
    assert patterns([names[0], names[2]], names) == ["re:blocks.[0-9]+.fc1.w$"]
    assert patterns([names[0], "stem.w"], names) == ["blocks.0.fc1.w", "stem.w"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "make", "--model", "resnet18", "--method", "obs", "--sparsity", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "OBS (WoodFisher) in one shot on resnet18: 19 weights of its blocks" in text.splitlines()[0]
    assert "Left dense: conv1.weight, fc.weight" in text
    (tmp_path / "made.yaml").write_text(text)
    assert recipes.load(tmp_path / "made.yaml").final_sparsity == 0.9
    assert main(["recipes", "lint", str(tmp_path / "made.yaml"), "--model", "resnet18"]) == 0
    for words, message in (
        (["resnet18"], "takes --model, no name"),
        ([], "needs --model"),
        (["--model", "resnet18", "--sparsity", "90"], "write 0.9 for 90 %"),
        (["--model", "resnet18", "--epochs", "0"], "must be at least 1"),
    ):
        assert main(["recipes", "make", *words]) == 2
        assert message in capsys.readouterr().err

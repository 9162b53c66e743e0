"""Recipes carried out without SparseML; and, where it is installed, the same bits as through SparseML."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from capruner import recipes
from capruner.cli.arguments import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "research" / "recipes" / "one_shot").rglob("*.yaml"))
SCHEDULE = "init_sparsity: 0.5, start_epoch: 0.0, end_epoch: 1.0, update_frequency: 1.0"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))


def recipe_file(folder: Path, name: str, more: str = "final_sparsity: 0.5, params: __ALL_PRUNABLE__") -> Path:
    (folder / "recipe.yaml").write_text(f"modifiers:\n  - !{name} {{{SCHEDULE}, {more}}}\n")
    return folder / "recipe.yaml"


class Batches:
    """The same images and labels each time, as pairs or as SparseML wants them."""

    def __iter__(self) -> Any:
        for images, _, labels in self({}):
            yield images[0], labels

    def __call__(self, kwargs: Any = None) -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield [torch.randn(4, 8, generator=generator)], {}, torch.randint(4, (4,), generator=generator)


def test_what_a_recipe_does_not_say_is_what_its_modifier_says(tmp_path: Path) -> None:
    found = recipes.load(recipe_file(tmp_path, "CAPruningModifier"))
    assert (found.method, found.global_sparsity, found.knobs["num_grads"], found.knobs["damp"]) == (
        "cap",
        True,
        "auto",
        None,
    )
    assert recipes.load(recipe_file(tmp_path, "FastCAPruningModifier")).global_sparsity is False
    assert recipes.load(recipe_file(tmp_path, "MagnitudePruningModifier")).global_sparsity is False
    assert recipes.load(recipe_file(tmp_path, "GlobalMagnitudePruningModifier")).global_sparsity is True
    obs = recipes.load(recipe_file(tmp_path, "OBSPruningModifier"))
    assert (obs.global_sparsity, obs.knobs["damp"], obs.knobs["fisher_block_size"]) == (True, 1e-7, 1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_shipped_recipe_is_read(path: Path) -> None:
    found = recipes.load(path)
    assert found.method == {"gm": "magnitude"}.get(path.parent.name, path.parent.name)
    assert found.final_sparsity == 0.5


def test_it_prunes(tmp_path: Path, model: nn.Module) -> None:
    lines = "params: [[0.weight], 2.weight], final_sparsity: 5e-1, num_grads: 4096.0, damp: 1e-3, blocks_in_parallel: -1, mask_type: 2:4"
    found = recipes.load(recipe_file(tmp_path, "CAPruningModifier", lines))
    assert str(found.knobs["mask_type"]) == "2:4"  # which YAML 1.1 reads as 124
    assert (found.knobs["num_grads"], found.knobs["blocks_in_parallel"]) == (4096, None)
    found.knobs["num_grads"] = 6
    assert list(found.selected(model)) == ["0.weight", "2.weight"]
    masks = found.prune(model, Batches(), nn.functional.cross_entropy).masks()
    assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for mask in masks.values())


def test_a_target_for_each_layer(tmp_path: Path, model: nn.Module) -> None:
    lines = "params: [], final_sparsity: {0.25: [0.weight], 0.5: [2.weight]}"
    found = recipes.load(recipe_file(tmp_path, "MagnitudePruningModifier", lines))
    masks = found.prune(model, None, nn.functional.cross_entropy).masks()
    assert [int((~mask).sum()) for mask in masks.values()] == [24, 24]


def test_excluded_layers_stay_dense(tmp_path: Path, model: nn.Module) -> None:
    lines = "params: __ALL_PRUNABLE__, final_sparsity: 0.5, num_grads: 6, exclude: ['2']"
    found = recipes.load(recipe_file(tmp_path, "CAPruningModifier", lines))
    assert list(found.selected(model)) == ["0.weight"]
    assert list(found.prune(model, Batches(), nn.functional.cross_entropy).masks()) == ["0.weight"]


BAD = {
    "no such parameter": ("CAPruningModifier", "colour: red", "has no parameter colour; it has .*mask_type, memory_budget, mode, n, num_grads"),
    "a parameter of another": ("MagnitudePruningModifier", "num_grads: 3", "has no parameter num_grads"),
    "global, said twice": ("MagnitudePruningModifier", "global_sparsity: True", "has no parameter global_sparsity; .*recipes convert FILE"),
    "half a gradient": ("OBSPruningModifier", "num_grads: 0.5", "num_grads 0.5 is invalid: expected a whole number"),
    "words": ("CAPruningModifier", "global_sparsity: maybe", "global_sparsity 'maybe' is invalid"),
    "mask type": ("CAPruningModifier", "mask_type: 4:2", "mask_type must be"),
    "schedule": ("CAPruningModifier", "inter_func: round", "inter_func 'round' is invalid: must be one of linear, cubic"),
    "percent": ("FastCAPruningModifier", "init_sparsity: 50", r"must lie in \[0, 1\), got 50"),
    "training": ("LearningRateFunctionModifier", "lr_func: linear", "acts in a training; take it out"),
    "quantization": ("QuantizationModifier", "x: 1", "take it out, and quantize the exported model"),
    "another pruner": ("MFACPruningModifier", "x: 1", r"MFACPruningModifier is none of .* --engine sparseml"),
    "gradient times weight": ("GWProdPruningModifier", "x: 1", r"use one of them \(CAPruningModifier is the nearest method\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, line, message = BAD[case]
    path = recipe_file(tmp_path, name, "final_sparsity: 0.5, params: __ALL_PRUNABLE__")
    text = path.read_text()
    key = line.partition(":")[0]
    path.write_text(
        re.sub(rf"{key}: [^,}}]*", line, text) if f"{key}:" in text else text.replace("}\n", f", {line}}}\n")
    )
    with pytest.raises(UserError, match=message):
        recipes.load(path)


@pytest.mark.parametrize("missing", ["params", "final_sparsity"])
def test_what_is_missing(missing: str, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "CAPruningModifier")
    path.write_text(path.read_text().replace(missing, "log_types"))
    with pytest.raises(UserError, match=f"CAPruningModifier has no {missing}"):
        recipes.load(path)


def test_two_modifiers(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "CAPruningModifier")
    path.write_text(path.read_text() + path.read_text().split("\n", 1)[1])
    with pytest.raises(
        UserError, match="exactly one pruning modifier, this one has CAPruningModifier, CAPruningModifier"
    ):
        recipes.load(path)


# Beside SparseML


def test_defaults_are_those_of_the_modifiers() -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    import inspect

    from sparseml.pytorch.sparsification import pruning

    import capruner.sparseml.modifiers as ours

    for name, kind in recipes.KINDS.items():
        if kind.ours:
            schedule = dict.fromkeys(("start_epoch", "end_epoch", "update_frequency"), 1.0)
            modifier = getattr(ours, name)(params="__ALL__", init_sparsity=0.1, final_sparsity=0.5, **schedule)
            said = {knob: getattr(modifier, knob) for knob in kind.knobs}
            said |= {"exclude": tuple(said["exclude"]), "mask_type": str(said["mask_type"])}
            globally = modifier.global_sparsity
        else:
            parameters = inspect.signature(getattr(pruning, name).__init__).parameters
            said = {knob: parameters[knob].default for knob in kind.knobs}
            globally = parameters["global_sparsity"].default if kind.says_globally else kind.globally
        assert said == kind.knobs, name
        assert globally == kind.globally


def tiny(path: Path, folder: Path) -> Path:
    """A shipped recipe for the tiny model: its layers, few gradients."""
    text = re.sub(r"params:\n(?: +- .*\n)+", "params: __ALL_PRUNABLE__\n", path.read_text())
    for key, value in (("num_grads", 6), ("fisher_block_size", 12)):
        text = re.sub(rf"{key}: .*", f"{key}: {value}", text)
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


@pytest.mark.promise(
    "Scripts", "One-shot recipes of CAP, FastCAP and magnitude give bit-identical results with and without SparseML"
)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_same_bits_as_through_sparseml(path: Path, tmp_path: Path, model: nn.Module, monkeypatch: Any) -> None:
    """Of SparseML's own OBS only the number of zeros is the same."""
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    import sys

    sys.path.insert(0, str(ROOT))
    from capruner.sparseml import recipe as by_sparseml

    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        model[0].weight.mul_(3)  # layers of unlike sizes: global and uniform differ
    written = tiny(path, tmp_path)
    sampler = {"data_loader_builder": Batches(), "loss_function": nn.functional.cross_entropy}
    uniform = yaml.safe_load(re.sub("!(.*)", "", written.read_text()))["modifiers"][0].get("mask_type")
    for sparsity in [0.5] if uniform else [0.5, 0.8]:
        expected, found = copy.deepcopy(model), copy.deepcopy(model)
        by_sparseml.apply_at(str(written), expected, sparsity, sampler)
        recipes.load(written).prune(found, Batches(), nn.functional.cross_entropy, [sparsity]).apply(found, sparsity)
        if path.parent.name == "obs":
            assert zeros(found) == zeros(expected)
        else:
            theirs = expected.state_dict()
            assert all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())


def zeros(model: nn.Module) -> int:
    count: Tensor = sum((p == 0).sum() for p in model.parameters() if p.dim() == 2)
    return int(count)

"""Every recipe of research/recipes against the real timm architectures: what it prunes, with which values, and when.

The architectures are built on the meta device, so without weights and in milliseconds. What a recipe ought to prune is computed here from the
modules and not from names, so that a pattern and this file cannot share a mistake.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from capruner.models.selection import select_parameters

timm = pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
RECIPES_DIR = ROOT / "research" / "recipes"
# The recipes of the demo prune a model that is built there, and are tested with it.
RECIPES = sorted(path for path in RECIPES_DIR.rglob("*.yaml") if not path.stem.startswith("digits"))
MODELS = {
    "vit": [
        "deit_small_patch16_224",
        "deit_small_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_base_patch16_224",
    ],
    "convnext": ["convnext_tiny", "convnext_atto", "convnextv2_tiny"],  # MLPs of Linear, of 1×1 convolutions, with GRN
    "xcit": ["xcit_small_12_p16_224", "xcit_tiny_12_p8_224"],
    "swin": ["swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"],
    "resnet50d": ["resnet50d"],
    "efficientnet": ["efficientnet_b0", "efficientnet_b4", "tf_efficientnet_b7"],
}
BLOCK_SIZE = {"vit": 192, "xcit": 192, "swin": 192, "convnext": 128, "resnet50d": 256, "efficientnet": 16}
MODIFIERS = {"cap": "CAPruningModifier", "fast_cap": "FastCAPruningModifier", "obs": "OBSPruningModifier"}
METHODS = (*MODIFIERS, "gm")
# Where the name does not say the sparsities: (first, last), per kind of recipe and rest of the name.
LADDERS = {
    ("gradual_pruning", "100ep_cyclic"): [0.4, 0.9],
    ("gradual_pruning", "100ep_cosine"): [0.4, 0.9],
    ("gradual_pruning", "10ep"): [0.4, 0.75],
    ("gradual_pruning", "4ep_small"): [0.75, 0.98],
    ("one_shot+finetune", "4ep_small"): [0.95],
}


class RecipeLoader(yaml.SafeLoader):
    """Reads ``!Name {...}`` as ``{"modifier": "Name", ...}``; a key that is given twice is an error."""


def _modifier(loader: RecipeLoader, tag: str, node: yaml.MappingNode) -> dict[str, Any]:
    keys = [key.value for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"{tag} gives a key twice: {keys}"
    return {"modifier": tag, **loader.construct_mapping(node, deep=True)}


RecipeLoader.add_multi_constructor("!", _modifier)


@cache
def content(recipe: Path) -> list[dict[str, Any]]:
    """All modifiers of a recipe, in the file's order."""
    groups = yaml.load(recipe.read_text(), RecipeLoader)
    return [modifier for group in groups.values() for modifier in group]


def pruning(recipe: Path) -> list[dict[str, Any]]:
    return [modifier for modifier in content(recipe) if modifier["modifier"].endswith("PruningModifier")]


def only(recipe: Path, name: str) -> dict[str, Any]:
    (modifier,) = [modifier for modifier in content(recipe) if modifier["modifier"] == name]
    return modifier


def kind(recipe: Path) -> str:
    return recipe.relative_to(RECIPES_DIR).parts[0]


def method(recipe: Path) -> str:
    return recipe.relative_to(RECIPES_DIR).parts[1]


def family(recipe: Path) -> str:
    return recipe.stem.split("_")[0]


def rest(recipe: Path) -> str:
    return recipe.stem.partition("_")[2]


def is_2of4(recipe: Path) -> bool:
    return "2of4" in recipe.stem.split("_")


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _weights(module: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    return [f"{name}.weight" for name, layer in module.named_modules() if wanted(name, layer)]


def _linear_inside(module: nn.Module, *blocks: str) -> list[str]:
    inside = {id(layer) for block in module.modules() if type(block).__name__ in blocks for layer in block.modules()}
    return _weights(module, lambda _, layer: isinstance(layer, nn.Linear) and id(layer) in inside)


def expected(name: str) -> list[str]:
    """The weights that the name of a family promises to prune, found by layer type and place, in the model's order."""
    module = model(name)
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    if "vit" in name or "deit" in name:
        return _linear_inside(module, "Block")
    if name.startswith("xcit"):
        return _linear_inside(module, "XCABlock", "ClassAttentionBlock")
    if name.startswith("swin"):
        head = module.get_classifier()
        return _weights(module, lambda _, layer: isinstance(layer, nn.Linear) and layer is not head)
    if name.startswith("convnext"):
        outside = {*module.stem.modules(), *module.head.modules()}
        return _weights(module, lambda _, layer: isinstance(layer, layers) and layer not in outside)
    stem = set((module.conv1 if name.startswith("resnet") else module.conv_stem).modules())
    return _weights(module, lambda _, layer: isinstance(layer, nn.Conv2d) and layer not in stem)


def recipes_of(*kinds: str) -> Any:
    chosen = [path for path in RECIPES if kind(path) in kinds]
    return pytest.mark.parametrize("recipe", chosen, ids=lambda path: str(path.relative_to(RECIPES_DIR)))


every_recipe = recipes_of("one_shot", "one_shot+finetune", "gradual_pruning")


def test_every_family_has_its_recipes():
    there = {(kind(path), method(path), family(path)) for path in RECIPES}
    tuning = ("one_shot+finetune", "gradual_pruning")
    assert {f for *_, f in there} == set(MODELS)
    assert {(k, m) for k, m, _ in there} == set(itertools.product(("one_shot", *tuning), METHODS))
    assert there >= {("one_shot", m, f) for m in METHODS for f in MODELS}
    assert there >= {(k, "cap", f) for k in tuning for f in MODELS}


# What is pruned


@every_recipe
def test_it_prunes_what_the_name_says(recipe):
    """All of it and nothing else; select_parameters also refuses an alternative that matches nothing."""
    for modifier, name in itertools.product(pruning(recipe), MODELS[family(recipe)]):
        selected = select_parameters(model(name), modifier["params"])
        assert list(selected) == expected(name), (recipe.stem, name)


@pytest.mark.parametrize("name", list(itertools.chain(*MODELS.values())))
def test_what_is_expected_is_most_of_the_model_and_neither_stem_nor_head(name):
    """The expectation itself, by counting; in EfficientNet-B0 the classifier alone is a quarter."""
    chosen, module = expected(name), model(name)
    sizes = {n: p.numel() for n, p in module.named_parameters()}
    assert sum(sizes[n] for n in chosen) > 0.69 * sum(sizes.values())
    layers = [f"{n}.weight" for n, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    dense = set(layers) - set(chosen)
    stem_or_head = re.compile(r"patch_embed|pos_embed|stem|conv_stem|conv1|head|fc\.|classifier|blocks\.\d+\.local_mp")
    assert dense
    assert all(stem_or_head.match(n) for n in dense), dense


def test_the_attention_is_pruned_in_full():
    """What public recipes missed: qkv as one matrix, and q, k, v apart in XCiT's class attention."""
    for name in MODELS["vit"]:
        assert sum(n.endswith("attn.qkv.weight") for n in expected(name)) == 12
    xcit = expected("xcit_small_12_p16_224")
    assert sum(n.endswith("attn.qkv.weight") for n in xcit) == 12
    assert sum(bool(re.search(r"attn\.[qkv]\.weight$", n)) for n in xcit) == 6


@every_recipe
def test_patterns_in_the_hands_of_sparseml(recipe):
    """SparseML's own modifiers take all that fits, see ``module.`` in front under data parallelism, and double the backslashes of what they save."""
    name = MODELS[family(recipe)][0]
    names = [n for n, _ in model(name).named_parameters()]
    for modifier, prefix in itertools.product(pruning(recipe), ("", "module.")):
        patterns = modifier["params"]
        assert all(re.match(r"re:[^\\]+\$$", pattern) for pattern in patterns)
        assert not re.search(r"\[[a-z]+\]", "".join(patterns)), "a class of letters stands for one letter"
        fits = [re.compile(pattern[3:]).match for pattern in patterns]
        assert [n for n in names if any(fit(prefix + n) for fit in fits)] == expected(name)


# With which values


@every_recipe
def test_the_published_values(recipe):
    f, m, words = family(recipe), method(recipe), set(recipe.stem.split("_"))
    small, again = words & {"small", "512grads"}, "8recomputations" in words
    for modifier in pruning(recipe):
        if m == "gm":
            uniform = words & {"uniform", "2of4"}
            assert modifier["modifier"] == ("MagnitudePruningModifier" if uniform else "GlobalMagnitudePruningModifier")
            assert not {"num_grads", "damp", "fisher_block_size", "global_sparsity"} & set(modifier)
            continue
        assert modifier["modifier"] == MODIFIERS[m]
        ours = m == "cap" and recipe.stem == "vit_512grads"  # everything by default
        assert modifier.get("fisher_block_size") == (None if ours else 128 if small else BLOCK_SIZE[f])
        damp = {"cap": 1e-7 if small or f == "resnet50d" else 1e-8, "obs": 1e-6, "fast_cap": 0.5}
        if m == "cap" and recipe.parent.parent.name == "one_shot":
            damp["cap"] = None  # ours, relative: it suits any scale of gradients; FastCAP's is measured too
        assert modifier.get("damp") == damp[m]
        num_grads = {128} if "10ep" in words else {256} if m == "fast_cap" else {256, 512} if small or again else {4096}
        assert modifier["num_grads"] in num_grads
        assert modifier.get("num_recomputations") == (8 if again else None)
        assert ("global_sparsity" in modifier) == (m != "fast_cap" and "2of4" not in words)


@every_recipe
def test_numbers_are_numbers(recipe):
    """YAML reads 1e-8 as a string, and 2:4 as the number 124."""
    other = {
        "modifier": str,
        "params": list,
        "inter_func": str,
        "lr_func": str,
        "mask_type": str,
        "global_sparsity": bool,
    }
    types = {**other, **dict.fromkeys(("num_grads", "fisher_block_size", "num_recomputations"), int)}
    for modifier in content(recipe):
        assert {key: type(value) for key, value in modifier.items()} == {k: types.get(k, float) for k in modifier}


@every_recipe
def test_2_of_4(recipe):
    for modifier in pruning(recipe):
        assert modifier.get("mask_type") == ("2:4" if is_2of4(recipe) else None)
        if is_2of4(recipe):
            assert modifier["init_sparsity"] == modifier["final_sparsity"] == 0.5
            assert modifier.get("fisher_block_size", 4) % 4 == 0
            for name in MODELS[family(recipe)]:
                weights = select_parameters(model(name), modifier["params"]).values()
                assert all(weight.shape[1] % 4 == 0 for weight in weights)  # input features, input channels of a group


# When


def updates(modifier: dict[str, Any]) -> list[float]:
    """Epochs at which a modifier prunes: start, every ``update_frequency``, end."""
    start, end, every = modifier["start_epoch"], modifier["end_epoch"], modifier["update_frequency"]
    count = (end - start) / every
    assert count == int(count), "the last update would come off the grid"
    return [start + i * every for i in range(int(count) + 1)]


def ladder(recipe: Path) -> list[float]:
    """The sparsities that the file's name promises."""
    named = [float(part) for part in rest(recipe).split("_") if re.fullmatch(r"0\.\d+", part)]
    return named or LADDERS.get((kind(recipe), rest(recipe)), [0.5])


@every_recipe
def test_the_ladder_is_the_one_in_the_name(recipe):
    stages = pruning(recipe)
    climbed = [stages[0]["init_sparsity"], *(stage["final_sparsity"] for stage in stages)]
    assert [s for s, _ in itertools.groupby(climbed)] == ladder(recipe)
    for before, after in itertools.pairwise(stages):
        assert after["init_sparsity"] == before["final_sparsity"]
        assert after["start_epoch"] == before["end_epoch"]
        differ = {key for key in before if before[key] != after[key]}
        assert differ <= {"init_sparsity", "final_sparsity", "start_epoch", "end_epoch"}


@recipes_of("one_shot")
def test_one_shot_has_one_modifier_and_nothing_else(recipe):
    """The script sets its sparsity; SparseML's one-shot takes the final one, by any interpolation but the inverse cubic."""
    (modifier,) = content(recipe)
    assert (modifier["start_epoch"], modifier["end_epoch"], modifier["update_frequency"]) == (0.0, 1.0, 1.0)
    assert "inter_func" not in modifier


@recipes_of("one_shot+finetune", "gradual_pruning")
def test_training_lasts_as_long_as_the_name_says(recipe):
    epochs = float(re.match(r"(\d+)ep", rest(recipe))[1])
    for name in ("EpochRangeModifier", "LearningRateFunctionModifier"):
        modifier = only(recipe, name)
        assert (modifier["start_epoch"], modifier["end_epoch"]) == (0.0, epochs)
    assert len(content(recipe)) == 2 + len(pruning(recipe))


@recipes_of("one_shot+finetune")
def test_finetuning_prunes_once_before_the_first_step(recipe):
    """Its end is the end of training: SparseML updates at an end_epoch only when training goes on, so that start is all there is."""
    (modifier,) = pruning(recipe)
    epochs = only(recipe, "EpochRangeModifier")["end_epoch"]
    assert modifier["init_sparsity"] == modifier["final_sparsity"]
    assert updates(modifier) == [0.0, epochs]
    rate = only(recipe, "LearningRateFunctionModifier")
    assert (rate["lr_func"], rate["final_lr"]) == ("linear", 1e-5)
    assert rate["init_lr"] == (1e-4 if epochs == 20 else 5e-4)


@recipes_of("gradual_pruning")
def test_gradual_pruning_ends_before_training_does(recipe):
    """SparseML makes the last update at the first step past end_epoch; without one the final sparsity would never be reached."""
    stages, epochs = pruning(recipe), only(recipe, "EpochRangeModifier")["end_epoch"]
    assert stages[0]["start_epoch"] == 0.0
    assert stages[-1]["end_epoch"] <= 0.95 * epochs
    for stage in stages:
        assert len(updates(stage)) >= 3
        assert stage["inter_func"] == ("cubic" if "small" in recipe.stem else "linear")


@recipes_of("gradual_pruning")
def test_the_published_schedules(recipe):
    stages = [(stage["start_epoch"], stage["end_epoch"]) for stage in pruning(recipe)]
    rate, every = only(recipe, "LearningRateFunctionModifier"), {s["update_frequency"] for s in pruning(recipe)}
    sgd = family(recipe) in ("resnet50d", "efficientnet")
    assert (rate["init_lr"], rate["final_lr"]) == ((0.2, 1e-3) if sgd else (5e-4, 1e-5))
    assert ("--opt sgd" if sgd else "--opt adamw") in recipe.read_text()
    epochs = rest(recipe).split("_")[0]
    ladders = {"300ep": [(0, 40), (40, 100), (100, 280)], "100ep": [(0, 80)], "10ep": [(0, 8)], "4ep": [(0, 2)]}
    assert stages == ladders[epochs]
    assert every == {{"300ep": 20, "100ep": 20, "10ep": 2, "4ep": 0.5}[epochs]}
    cyclic = epochs == "300ep" or "cyclic" in recipe.stem
    assert rate["lr_func"] == ("cyclic_linear" if cyclic else "cosine" if "cosine" in recipe.stem else "linear")
    assert rate.get("cycle_epochs") == (20.0 if cyclic else None)  # SparseML's linear ignores it
    if cyclic:  # each update meets a learning rate at the top of its cycle
        assert all(epoch % rate["cycle_epochs"] == 0 for stage in pruning(recipe) for epoch in updates(stage))


@every_recipe
def test_the_header_says_how_to_run_it(recipe):
    lines = recipe.read_text().splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert len(header) == 3
    assert header[1].startswith("# Left dense: ")
    assert f"capruner {'prune' if kind(recipe) == 'one_shot' else 'train'} --" in header[2]
    name = re.search(r"--sparseml-recipe (\S+)", header[2])[1]
    assert f"{name}.yaml" == recipe.relative_to(RECIPES_DIR).as_posix()
    shown = re.search(r"--model (\S+)", header[2])[1]
    assert list(select_parameters(model(shown), pruning(recipe)[0]["params"])) == expected(shown)


@every_recipe
def test_sparseml_loads_it_and_what_it_saves(recipe, sparseml_manager):
    manager = sparseml_manager.from_yaml(str(recipe))
    again = sparseml_manager.from_yaml(str(manager))
    written = content(recipe)
    for loaded in (manager, again):
        assert loaded.max_epochs == max(modifier["end_epoch"] for modifier in written)
        assert len(loaded.modifiers) == len(written)
        for want in written:
            if loaded is again and want["modifier"] == "MagnitudePruningModifier" and is_2of4(recipe):
                continue  # SparseML's own modifier saves 2:4 without quotes, which YAML reads as 124; ours knows that
            names = [name for name in want if name != "modifier"]
            found = [[type(m).__name__, *(getattr(m, name, None) for name in names)] for m in loaded.modifiers]
            assert list(want.values()) in found


@pytest.fixture(scope="session")
def sparseml_manager():
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)  # registers the modifiers
    return importlib.import_module("sparseml.pytorch.optim").ScheduledModifierManager


def test_the_ladder_as_sparseml_climbs_it(sparseml_manager, tmp_path, monkeypatch):
    """The 300 epochs with two steps each, on a ViT of two tiny blocks: the sparsity in front of every forward pass, and the learning rate."""
    monkeypatch.chdir(tmp_path)  # SparseML writes sparse_logs/ where it stands
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=20, depth=2, num_heads=1, num_classes=2
    )
    manager = sparseml_manager.from_yaml(str(RECIPES_DIR / "gradual_pruning/gm/vit_300ep_0.40_0.60_0.75_0.90.yaml"))
    optimizer = torch.optim.SGD(vit.parameters(), lr=1.0)
    optimizer = manager.modify(vit, optimizer, steps_per_epoch=2)
    weights = [parameter for name, parameter in vit.named_parameters() if re.match(r"blocks.*(attn|mlp).*weight", name)]
    images, total = torch.randn(2, 3, 8, 8), sum(weight.numel() for weight in weights)
    reached, rates = {}, {}
    for epoch in range(300):
        for _ in range(2):
            optimizer.zero_grad()
            vit(images).square().mean().backward()
            optimizer.step()
        reached[epoch] = sum(int((weight == 0).sum()) for weight in weights) / total
        rates[epoch] = optimizer.param_groups[0]["lr"]
    manager.finalize(vit)
    want = {0: 0.4, 19: 0.4, 20: 0.5, 40: 0.6, 60: 0.65, 100: 0.75, 279: 0.75 + 0.15 * 8 / 9, 280: 0.9, 299: 0.9}
    assert {epoch: reached[epoch] for epoch in want} == pytest.approx(want, abs=2 / total)
    assert 0 < min(rates.values()) <= max(rates.values()) <= 5e-4

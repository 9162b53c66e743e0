"""Every recipe of the original CAP repository: read, converted, and carried out on tiny models by capruner and by SparseML.

    python qa/original_recipes.py CLONE             # CLONE: the folder of a clone of that repository

A recipe is tried as it is, and as ``capruner recipes convert`` rewrites it, in a shorter form: few gradients, small blocks, and an update at each epoch of
two steps. Patterns, sparsities, methods and the order of things are the recipe's. In the end zeros are counted: there must be as many as it says. Exit code 1:
a traceback, another number of zeros, or weights of CAP and FastCAP that depend on the engine.
"""

from __future__ import annotations

import argparse
import collections
import functools
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.core.patterns import parse_mask_type
from capruner.models.selection import SelectionError, select_parameters
from capruner.recipes.convert import convert
from capruner.recipes.document import Modifier
from capruner.recipes.one_shot import OURS, read_modifiers
from capruner.vision import engines, training_recipe
from capruner.vision.engines import cross_entropy
from capruner.vision.training_loop import Stepper

SIZE, STEPS = 32, 2
ENGINES = ["native", "sparseml"] if find_spec("sparseml") else ["native"]
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}),
    "resnet": ("resnet50d", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16), "stem_width": 4}),
    "efficientnet": ("tf_efficientnetv2_b0", {"channel_multiplier": 0.1, "depth_multiplier": 0.3}),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": SIZE}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "img_size": SIZE, "window_size": 4}),
    "": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": 8}),
}  # fmt: skip
"""By a word of the file's name: an architecture, and how it is made small."""


def tiny(family: str) -> nn.Module:
    """A small model of the family that a recipe is for."""
    model, kwargs = TINY[next(word for word in TINY if word in family)]
    if family == "convnext_bs":
        kwargs = {**kwargs, "head_hidden_size": 16}  # of the model that its launch script names
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=4, **kwargs)


class Batches:
    """The same images each time."""

    def __call__(self, kwargs: Any = None) -> Iterator[Any]:
        return iter(self)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
            yield [images], {}, torch.randint(4, (2,), generator=generator)


def one_shot(path: Path, engine: str, model: nn.Module) -> None:
    """Prune in place."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = engines.open_recipe(str(path), engine, Path(folder))
        recipe.names(model)
        recipe.check_sparsities(model, [])
        if recipe.once:
            result = recipe.prune(model, [], Batches())
            result.apply(model)
        else:
            recipe.apply_at(str(path), model, recipe.final_sparsity, Batches)


def training(path: Path, engine: str, model: nn.Module) -> None:
    """Train, two steps in an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = training_recipe.open_training(str(path), engine, Path(folder), None)
        recipe.check(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        stepper = Stepper(model, optimizer, scaler, argparse.Namespace(clip_grad=1.0, clip_mode="norm"))
        recipe.attach(model, optimizer, stepper, STEPS, 0, lambda kwargs=None: Batches())
        data = iter(Batches())
        for _ in range(recipe.end * STEPS):
            (images,), _, labels = next(data)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            for group in optimizer.param_groups:
                group["lr"] = min(group["lr"], 1e-3)  # of these random networks most recipes' rates would make NaN
            recipe.step()
        recipe.close(float(recipe.end))


def asked_for(modifiers: list[Modifier], model: nn.Module) -> dict[str, float]:
    """The share of zeros of each parameter group that a recipe names, in the end; keys are the groups' names, joined."""
    pruning = [m for m in modifiers if m.name.endswith("PruningModifier")]
    last = max(pruning, key=lambda m: float(m.values["end_epoch"]))
    chosen = select_parameters(model, last.values["params"], trainable=False)
    if "final_sparsity" not in last.values:
        return {name: 0.5 if p.dim() > 1 else 0.0 for name, p in chosen.items()}
    pattern = parse_mask_type(last.values.get("mask_type", "unstructured"), last.values.get("n"), last.values.get("m"))
    together = last.values.get("global_sparsity", last.name != "MagnitudePruningModifier" and "Fast" not in last.name)
    groups = [" ".join(chosen)] if together and pattern.n_m is None else list(chosen)
    return dict.fromkeys(groups, float(last.values["final_sparsity"]))


def off_by(model: nn.Module, shares: dict[str, float]) -> int:
    """How many zeros there are too many or too few."""
    parameters = dict(model.named_parameters())
    worst = 0
    for group, share in shares.items():
        weights = [parameters[name] for name in group.split()]
        zeros, total = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
        worst = max(worst, abs(zeros - round(share * total)))
    return worst


@dataclass
class Outcome:
    """Of one recipe in the hands of one engine: the words of a refusal, a traceback's, or the weights."""

    refusal: str = ""
    crash: str = ""
    off: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Neither a refusal in words nor the zeros asked for."""
        return bool(self.crash or self.off)

    def __str__(self) -> str:
        if self.refusal or self.crash:
            return f"refused: {self.refusal}" if self.refusal else f"WRONG: {self.crash}"
        return f"WRONG: {self.off} zeros too many or too few" if self.off else "prunes what it says"


def shorter(text: str) -> str:
    """A recipe with an update at each epoch, few gradients, and blocks that have fewer weights than that where they had."""
    frequencies = [float(value) for value in re.findall(r"update_frequency: (\S+)", text)]
    unit = min(frequencies, default=10.0)

    def scaled(match: re.Match[str]) -> str:
        return f"{match[1]}: {float(match[2]) / unit:g}"

    text = re.sub(r"(start_epoch|end_epoch|update_frequency|cycle_epochs): (\S+)", scaled, text)
    text = re.sub(r"num_grads: (\d+)", lambda match: f"num_grads: {16 if int(match[1]) >= 256 else 8}", text)
    return re.sub(r"fisher_block_size: (\d+)", lambda match: f"fisher_block_size: {min(12, int(match[1]))}", text)


@functools.cache
def carried_out(text: str, family: str, engine: str) -> Outcome:
    """Carry out a recipe that is short already; many of them are the same by then."""
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "recipe.yaml"
        short.write_text(text)
        model = tiny(family)
        try:
            modifiers = read_modifiers(short)
            if any(m.name == "ConstantPruningModifier" for m in modifiers):
                for p in model.parameters():
                    p.data.view(-1)[: p.numel() // 2 if p.dim() > 1 else 0] = 0.0
            train = any(m.name == "EpochRangeModifier" for m in modifiers)
            (training if train else one_shot)(short, engine, model)
        except (UserError, SelectionError) as error:
            return Outcome(refusal=str(error).replace(f"{folder}/", ""))
        except Exception as error:
            return Outcome(crash=f"{type(error).__name__}: {error}")
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return Outcome(off=off_by(model, asked_for(modifiers, model)), weights=weights)


def tried(path: Path, name: str) -> tuple[list[Outcome], list[str]]:
    """Outcomes by engine, and the modifiers that prune."""
    family = "convnext_bs" if "convnext_bs" in name else next(word for word in TINY if word in name)
    found = [carried_out(shorter(path.read_text()), family, engine) for engine in ENGINES]
    for engine, outcome in zip(ENGINES, found):
        print(f"   {engine}: {outcome}")
    return found, sorted(set(re.findall(r"!(\w+PruningModifier)", path.read_text())))


def by_whom(when: str, found: list[Outcome]) -> str:
    """Who carries a recipe out; nothing if nobody does."""
    able = [engine for engine, outcome in zip(ENGINES, found) if not outcome.refusal]
    if not able:
        return ""
    return when if len(able) == len(ENGINES) else f"{when} by the {able[0]} engine only"


def main() -> int:
    """Try all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    root = args.clone / "research" / "recipes"
    counts, faults = collections.Counter[str](), 0
    for path in sorted(root.rglob("*.yaml")):
        name = str(path.relative_to(root))
        print(name)
        found, modifiers = tried(path, name)
        faults += sum(outcome.wrong for outcome in found)
        group = by_whom("as it is", found)
        text, changes, problems = convert(path)
        if changes or problems:
            with tempfile.TemporaryDirectory() as folder:
                new = Path(folder) / path.name
                new.write_text(text)
                print("   converted" + "".join(f"\n      left to do by hand: {problem}" for problem in problems))
                found, _ = tried(new, name)
            faults += sum(outcome.wrong for outcome in found)
        group = group or by_whom("after convert", found) or "refused"
        counts[group] += 1
        if len(found) == 2 and all(o.weights for o in found) and set(modifiers) <= OURS | {"ConstantPruningModifier"}:
            first, second = (o.weights for o in found)
            if not all(torch.allclose(first[n], second[n], rtol=1e-3, atol=1e-5) for n in first):
                print("   WRONG: the engines differ")
                faults += 1
        print(f"   {group}", flush=True)
    print(
        f"{counts.total()} recipes: "
        + "; ".join(f"{count} {group}" for group, count in counts.most_common())
        + f". {faults} faults"
    )
    return 1 if faults or not counts else 0


if __name__ == "__main__":
    sys.exit(main())

"""The forms in which public CAP and FastCAP recipes are written: each loads, prunes the layers that it says, exactly, also at a second update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
from sparseml.pytorch.optim import ScheduledModifierManager

import capruner.sparseml  # noqa: F401 (registers the modifiers)

LINEAR = "re:.*blocks.[0-9]+.(attn.(qkv|proj)|mlp.(fc1|fc2)).weight$"
ONE_SHOT = "init_sparsity: 0.5|final_sparsity: 0.5|start_epoch: 0.0|end_epoch: 1.0|update_frequency: 1.0"
LADDER = "start_epoch: 0.0|end_epoch: 2.0|update_frequency: 1.0|inter_func: linear|leave_enabled: True|global_sparsity: True|mask_type: unstructured"

# name: (modifier, lines, sparsity at each update, share of zeros in every group of four or None)
FORMS: dict[str, tuple[str, str, list[float], int | None]] = {
    "one-shot, damp as a string": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-8|num_grads: 6", [0.5], None),
    "one-shot, all knobs": (
        "CAPruningModifier",
        f"{ONE_SHOT}|damp: 1.0e-5|num_grads: 6|blocks_in_parallel: -1|fisher_inv_device: cpu|traces_backup_dir: None|num_recomputations: 1",
        [0.5],
        None,
    ),
    "recomputations": (
        "CAPruningModifier",
        f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|num_recomputations: 5|recomputation_inter_func: cubic|global_sparsity: False",
        [0.5],
        None,
    ),
    "uniform": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|global_sparsity: False", [0.5], None),
    "2:4 quoted": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|mask_type: '2:4'", [0.5], 2),
    "2:4 unquoted": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|mask_type: 2:4", [0.5], 2),
    "N:M with n and m": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|mask_type: N:M|n: 2|m: 4", [0.5], 2),
    "block4": ("CAPruningModifier", f"{ONE_SHOT}|damp: 1e-5|num_grads: 6|mask_type: block4", [0.5], None),
    "FastCAP": ("FastCAPruningModifier", f"{ONE_SHOT}|damp: 1e-2|num_grads: 6", [0.5], None),
    "FastCAP, block_size": ("FastCAPruningModifier", f"{ONE_SHOT}|damp: 1e-2|num_grads: 6|block_size: 8", [0.5], None),
    "FastCAP 2:4": ("FastCAPruningModifier", f"{ONE_SHOT}|damp: 1e-2|num_grads: 6|mask_type: 2:4", [0.5], 2),
    "gradual": ("CAPruningModifier", f"init_sparsity: 0.4|final_sparsity: 0.6|{LADDER}|damp: 1e-5|num_grads: 6", [0.4, 0.5, 0.6], None),
    "gradual to an int": ("CAPruningModifier", f"init_sparsity: 0|final_sparsity: 0.6|{LADDER}|damp: 1e-5|num_grads: 6", [0.0, 0.3, 0.6], None),
    "gradual FastCAP": (
        "FastCAPruningModifier",
        "init_sparsity: 0.4|final_sparsity: 0.9|start_epoch: 0.0|end_epoch: 2.0|update_frequency: 1.0|inter_func: linear|damp: 1e-2|num_grads: 6",
        [0.4, 0.65, 0.9],
        None,
    ),
}  # fmt: skip


def recipe(modifier: str, lines: str, params: str = LINEAR) -> str:
    body = [f"params: ['{params}']", "fisher_block_size: 16", *lines.split("|")]
    return f"modifiers:\n  - !{modifier}\n" + "".join(f"      {line}\n" for line in body)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4
    )


def samples(kwargs: dict[str, Any] | None = None) -> Iterator[tuple[list[Tensor], dict[str, Any], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randn(2, 3, 8, 8, generator=generator)], {}, torch.randint(4, (2,), generator=generator)


GRAD_SAMPLER = {"data_loader_builder": samples, "loss_function": nn.functional.cross_entropy}


def pruned_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p
        for name, p in model.named_parameters()
        if name.startswith("blocks") and p.dim() == 2 and "norm" not in name
    }


def check(model: nn.Module, sparsity: float, exact_layers: bool, stay: int | None) -> None:
    weights = pruned_weights(model)
    assert len(weights) == 8
    assert any("attn.qkv" in name for name in weights)
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    assert sum(zeros.values()) == round(sparsity * sum(w.numel() for w in weights.values()))
    if exact_layers:
        assert zeros == {name: round(sparsity * w.numel()) for name, w in weights.items()}
    if stay is not None:
        assert all(((w.view(-1, 4) != 0).sum(dim=1) == stay).all() for w in weights.values())
    others = [p for name, p in model.named_parameters() if name not in weights and p.dim() > 1]
    assert not any((p == 0).any() for p in others)


@pytest.mark.parametrize("form", FORMS)
def test_it_prunes_what_it_says_and_loads_again_when_saved(form: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    modifier, lines, sparsities, stay = FORMS[form]
    manager = ScheduledModifierManager.from_yaml(recipe(modifier, lines))
    saved = "modifiers:\n  - " + str(manager.modifiers[0]).replace("\n", "\n    ")
    again = ScheduledModifierManager.from_yaml(saved)
    assert str(again.modifiers[0]) == str(manager.modifiers[0])
    uniform = "FastCAP" in modifier or "global_sparsity: False" in lines
    model = vit()
    if len(sparsities) == 1:
        again.apply(model, grad_sampler=GRAD_SAMPLER, finalize=True)
        check(model, sparsities[0], uniform, stay)
        return
    optimizer = again.modify(
        model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), steps_per_epoch=2, grad_sampler=GRAD_SAMPLER
    )
    data = samples()
    for epoch in range(4):
        before = {name: (w != 0).clone() for name, w in pruned_weights(model).items()}
        for _ in range(2):
            inputs, _, target = next(data)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(*inputs), target).backward()
            optimizer.step()
            check(model, sparsities[min(epoch, 2)], uniform, stay)
        for name, w in pruned_weights(model).items():
            assert not ((w != 0) & ~before[name]).any()  # what was gone stays gone
            assert (w != 0).any()  # the second update of the published code leaves nothing
    again.finalize(model)


def test_the_published_character_class_is_an_error_and_says_what_was_meant() -> None:
    published = "re:.*(attn.[qkv].weight|attn.proj.weight|mlp.fc1.weight|mlp.fc2.weight)"
    manager = ScheduledModifierManager.from_yaml(recipe("CAPruningModifier", f"{ONE_SHOT}|num_grads: 6", published))
    with pytest.raises(ValueError, match=r"attn\.\[qkv\]\.weight.*without the brackets it would match"):
        manager.apply(vit(), grad_sampler=GRAD_SAMPLER)

"""Models from a command line, and their accuracy."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_case import SMALLER as KWARGS

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm

from capruner.cli import arguments
from capruner.cli.arguments import UserError
from capruner.vision import evaluate, modeling, one_shot_pruning, training_arguments

NAME = "vit_tiny_patch16_224"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_is_loaded(tmp_path, suffix, capsys):
    path = tmp_path / f"weights.{suffix}"
    wanted = timm.create_model(NAME, **KWARGS).state_dict()
    save_file(wanted, path) if suffix == "safetensors" else torch.save(wanted, path)
    model = modeling.build_model(NAME, KWARGS, str(path), pretrained=False)
    assert not model.training
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("main", [one_shot_pruning.main, training_arguments.parse])
def test_random_weights_have_to_be_asked_for(main, tmp_path):
    line = ["--data-dir", str(tmp_path), "--model", NAME, "--sparseml-recipe", "one_shot/gm/vit"]
    if main is training_arguments.parse:
        args = main(line)
        with pytest.raises(UserError, match="where do its weights come from"):
            arguments.check_weights(args)
        arguments.check_weights(main([*line, "--random-weights"]))
    else:
        with pytest.raises(UserError, match="Give --pretrained, --checkpoint FILE, or --random-weights"):
            main(line)


def test_a_checkpoint_of_another_model(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(NAME, **KWARGS | {"embed_dim": 16}).state_dict(), path)
    with pytest.raises(
        UserError,
        match=r"--checkpoint .*weights.safetensors: .* does not fit vit_tiny_patch16_224: .*(size mismatch|Missing key)",
    ):
        modeling.build_model(NAME, KWARGS, str(path), pretrained=False)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_damaged_checkpoint(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match="--checkpoint"):
        modeling.build_model(NAME, KWARGS, str(tmp_path / name), pretrained=False)


def test_arguments_that_the_model_does_not_take():
    with pytest.raises(UserError, match=r"cannot be built with --model-kwargs .*colour"):
        modeling.build_model(NAME, KWARGS | {"colour": 1}, "", pretrained=False)


def test_devices():
    assert modeling.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert modeling.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device gpu: torch knows no such device"):
        modeling.pick_device("gpu")
    with pytest.raises(UserError, match=r"--device cuda:99: torch sees .* GPU here"):
        modeling.pick_device("cuda:99")


def test_one_seed_for_all_generators():
    drawn = []
    for seed in (1, 1, 2):
        modeling.seed_everything(seed)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2]))


class Echo(nn.Module):
    """Its inputs are its outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_every_image_counts_once():
    """A batch of four, all right, and a batch of one, wrong: 80 % and not the batches' mean of 50 %."""
    logits = 5.0 * torch.eye(7)[[0, 1, 2, 3, 4]]
    batches = [(logits[:4], torch.arange(4)), (logits[4:], torch.tensor([6]))]
    model = Echo().train()
    found = evaluate.evaluate(model, batches, torch.device("cpu"))
    labels = torch.tensor([0, 1, 2, 3, 6])
    assert found["top1"] == pytest.approx(80.0)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert found["images"] == 5
    assert model.training


def test_top5():
    logits = torch.arange(10.0).repeat(2, 1)  # 9 is first, 5 is fifth, 4 is sixth
    found = evaluate.evaluate(Echo(), [(logits, torch.tensor([5, 4]))], torch.device("cpu"))
    assert (found["top1"], found["top5"]) == (0.0, 50.0)


def test_top5_of_fewer_classes():
    found = evaluate.evaluate(Echo(), [(torch.eye(3), torch.tensor([0, 1, 0]))], torch.device("cpu"))
    assert found["top1"] == pytest.approx(200 / 3)
    assert found["top5"] == 100.0


class WithAuxiliary(nn.Module):
    """An Inception: two outputs in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(3 * 16 * 16, 2)

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.linear(self.drop(self.norm(x)).flatten(1))
        return (scores, scores) if self.training else scores


def test_auxiliary_outputs_are_refused_in_training_only():
    model = WithAuxiliary()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modeling.check_forward(model, (3, 16, 16), "inception")
    with pytest.raises(UserError, match=r"inception returns a tuple in training mode .* aux_logits=False"):
        modeling.check_forward(model, (3, 16, 16), "inception", training=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_images_of_another_size_are_refused():
    model = timm.create_model(NAME, **KWARGS)
    with pytest.raises(UserError, match=r"does not take images of \(3, 64, 64\): .*--model-kwargs img_size=64"):
        modeling.check_forward(model, (3, 64, 64), NAME)


def test_models_from_a_folder_are_built_as_timm_builds_them(tmp_path):
    import json

    wanted = timm.create_model(NAME, **KWARGS)
    config = {
        "architecture": NAME,
        "num_classes": 2,
        "model_args": {k: v for k, v in KWARGS.items() if k != "num_classes"},
    }
    config["pretrained_cfg"] = {"num_classes": 2, "input_size": [3, 16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(wanted.state_dict(), tmp_path / "model.safetensors")
    model = modeling.build_model(f"local-dir:{tmp_path}", {}, "", pretrained=True)
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())
    from capruner.report.architecture import architecture, input_size

    assert input_size(architecture(f"local-dir:{tmp_path}", {})) == (3, 16, 16)


@pytest.mark.parametrize("name", ["local-dir:/nowhere", "zoo:resnet18", "timm/resnet18.a1_in1k", "local-dir:"])
def test_models_that_no_source_has_are_one_line(name):
    with pytest.raises(UserError, match=name) as caught:
        modeling.build_model(name, {}, "", pretrained=False)
    assert "\n" not in str(caught.value)


def test_a_model_s_source_is_no_part_of_the_experiment_s_name():
    from capruner.vision.output import model_label

    assert model_label("hf-hub:timm/resnet18.a1_in1k") == "timm_resnet18.a1_in1k"
    assert model_label("local-dir:/models/../mine") == "models_.._mine"
    assert model_label("resnet18.a1_in1k") == "resnet18.a1_in1k"

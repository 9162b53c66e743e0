"""What is refused, or said, in places that no other test comes by: the branches that coverage had found uncovered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruning_case import conv_net, images, mlp, prune, vectors
from safetensors.torch import save_file
from torch import nn

import capruner
from capruner.core.numerics import NotPositiveDefiniteError
from capruner.core.patterns import Pattern, eliminate_groups, parse_mask_type
from capruner.report import write_report
from capruner.report.architecture import architecture, architecture_macs
from capruner.report.contents import Contents, Measurement
from capruner.report.page import page
from capruner.report.verification import read_masks, verify


def test_a_loss_that_is_no_function() -> None:
    with pytest.raises(ValueError, match="loss_fn must be a function of outputs and targets, got 'cross_entropy'"):
        capruner.prune(mlp(), vectors(), "cross_entropy", 0.5)  # type: ignore[arg-type]


def test_groups() -> None:
    assert parse_mask_type(Pattern(group=4)) == Pattern(group=4)
    with pytest.raises(ValueError, match="a block of 6 weights does not hold whole groups of 4"):
        eliminate_groups(torch.ones(1, 6), torch.eye(6)[None], 4)
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 2
    with pytest.raises(NotPositiveDefiniteError, match="the system of a group will not factor"):
        eliminate_groups(torch.ones(1, 4), indefinite[None], 2)


def test_a_saved_outcome_that_is_of_another_run(tmp_path: Path) -> None:
    prune(conv_net(), images(), state_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    (tensors,) = folder.glob("*.safetensors")
    (manifest,) = folder.glob("*.json")
    save_file({"0/weight/elsewhere": torch.ones(1)}, tensors)
    whole = json.loads(manifest.read_text())
    from capruner.files import digest, file_digest

    whole["state"]["steps"][0]["files"] = {tensors.name: file_digest(tensors)}
    manifest.write_text(json.dumps({"sha256": digest([whole["state"]]), "state": whole["state"]}))
    with pytest.raises(capruner.StateError, match="has no outcome of this run"):
        prune(conv_net(), images(), state_dir=tmp_path)


def test_reports_of_what_is_no_folder_or_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing is not a folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(ValueError, match="cannot be built with --model-kwargs"):
        architecture("vit_tiny_patch16_224", {"dept": 2})
    with pytest.raises(RuntimeError, match=r"a forward pass at .* fails"):
        architecture_macs(architecture("vit_tiny_patch16_224", {"depth": 1}), img_size=7)


def test_a_page_about_nothing_yet() -> None:
    assert "Nothing is pruned yet." in page(Contents("empty", "vit_tiny_patch16_224", []))
    unmeasured = Measurement("50 %", 0.5, 0.5, 0.4)
    text = page(Contents("unmeasured", "vit_tiny_patch16_224", [unmeasured]))
    assert "50.00 % of the prunable weights are zero, 40.00 % of all." in text


def masks_file(content: dict[str, torch.Tensor] | bytes, name: str = "masks.safetensors") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            save_file(content, folder / name)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "none.safetensors", FileNotFoundError, "no masks at"),
        (masks_file(b"not a tensor file"), ValueError, "is damaged"),
        (masks_file(b"not a tensor file", "masks.pth"), ValueError, "masks.pth"),
    ],
    ids=["missing", "damaged", "pth"],
)
def test_masks_that_cannot_be_read(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read_masks(make(tmp_path), {})


def test_masks_of_another_network_and_patterns_that_cannot_be(tmp_path: Path) -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 18, "depth": 1, "num_heads": 2, "num_classes": 3}
    weights = {k: v.clone() for k, v in architecture("vit_tiny_patch16_224", kwargs).to_empty(device="cpu").state_dict().items()}  # fmt: skip
    for value in weights.values():
        nn.init.constant_(value, 1.0)
    weights["blocks.0.attn.qkv.weight"][:, ::2] = 0
    save_file(weights, tmp_path / "sparse.safetensors")
    masks = masks_file({"elsewhere.weight": torch.ones(2, 2, dtype=torch.bool)})(tmp_path)
    found = verify(
        tmp_path / "sparse.safetensors",
        "vit_tiny_patch16_224",
        kwargs,
        ["blocks.0.attn.qkv"],
        masks=masks,
        pattern="2:4",
    )
    details = {check["name"]: check["detail"] for check in found["checks"] if not check["ok"]}
    assert "no such parameter, or of another shape: elsewhere.weight" in details["masks"]
    assert "18 inputs are no multiple of 4" in str(details)


def test_bad_data_behind_a_finite_loss() -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.nan_to_num(), targets)

    data = [(x.clone(), y) for x, y in vectors()]
    data[2][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 2 is bad: its inputs hold NaN or Inf, although its loss is finite"):
        capruner.prune(mlp(), data, loss, 0.5, num_grads=30, progress=False)


def test_magnitude_takes_no_gradients_and_keeps_none() -> None:
    from capruner.distributed import Partition
    from capruner.methods import METHODS
    from capruner.methods.base import Stopwatch

    method = METHODS["magnitude"](Partition({}), capruner.PruneConfig().settings(), Stopwatch())
    with pytest.raises(TypeError, match="magnitude pruning takes no gradients"):
        method.add({})
    with pytest.raises(ValueError, match=r"method 'magnitude' keeps no gradients of 0\.weight"):
        method.load_state_dict("0.weight", {})
    assert method.state_dict() == {}


def test_the_command_line_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    from capruner.cli import main

    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"capruner {capruner.__version__}\n"
    assert main.main(["--debug"]) == 2
    for words in (["help"], ["--debug", "--help"]):
        assert main.main(words) == 0
        assert "usage: capruner COMMAND" in capsys.readouterr().out
    assert main.main(["prun"]) == 2
    assert "capruner has no command 'prun'; did you mean prune?" in capsys.readouterr().err


def test_a_command_whose_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from capruner.cli import main

    def missing(command: str) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name=name)

    monkeypatch.setattr(main, "_module", missing)
    name = "timm.data"
    assert main.main(["verify"]) == 2
    assert "capruner verify needs the package timm, which is not installed" in capsys.readouterr().err
    name = "capruner.cli.verify"  # ours: a fault, not the user's
    assert main.main(["verify"]) == 2
    assert "internal error, please report it: ModuleNotFoundError" in capsys.readouterr().err


def test_a_recipe_without_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    from capruner.cli import main

    (tmp_path / "idle.yaml").write_text(
        "modifiers:\n  - !EpochRangeModifier\n      start_epoch: 0\n      end_epoch: 1\n"
    )
    words = ["recipes", "lint", str(tmp_path / "idle.yaml"), "--model", "vit_tiny_patch16_224"]
    assert main.main(words) == 2
    assert "has no pruning modifier, so nothing to check" in capsys.readouterr().err

"""ONNX files that compute what torch computes, zeros included, and the 2:4 form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_case import KWARGS, MODEL

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
import capruner  # noqa: E402
from capruner.cli.main import main  # noqa: E402
from capruner.deploy import export, semi_structured  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT at 75 %."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, **KWARGS)
    capruner.prune(model, None, sparsity=0.75, method="magnitude", progress=False).apply(model)
    path = tmp_path_factory.mktemp("export") / "sparsity_0.75.safetensors"
    save_file(model.state_dict(), path)
    return path


WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capruner", *map(str, words)], capture_output=True, text=True)


def test_onnx_as_a_user_types_it(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    done = command("export", checkpoint, *WORDS, "--output", file)
    assert done.returncode == 0, done.stderr
    assert "dynamic batch of 3×16×16" in done.stdout
    model = timm.create_model(MODEL, **KWARGS, checkpoint_path=checkpoint).eval()
    x = torch.randn(5, 3, 16, 16)
    found = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[
        0
    ]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert "LayerNormalization" not in operators  # DeepSparse 1.8 has it, but slower than its parts
    zeros = sum(int((w == 0).sum()) for w in load_file(checkpoint).values() if w.dim() > 1)
    assert f"{zeros:,} zeros" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_lite0"])
def test_other_families(name: str, tmp_path: Path) -> None:
    size = {"img_size": 56} if "swin" in name else {}
    model = timm.create_model(name, num_classes=3, **size)
    found = export.to_onnx(model, tmp_path / "m.onnx", (3, 56, 56))
    assert found.difference < 1e-4


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"differ by .* the file was not written"):
        export.to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tmp_path / "m.onnx", (3, 2, 2), tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), *WORDS, "--output", str(tmp_path / "w.safetensors")]) == 0
    timm.create_model(MODEL, **KWARGS, checkpoint_path=tmp_path / "w.safetensors")


def test_sparse(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(checkpoint), *WORDS, "--format", "sparse", "--output", str(tmp_path / "w.safetensors")]
    assert main(line) == 0
    assert "times smaller than dense" in capsys.readouterr().out
    weights, loaded = load_file(checkpoint), capruner.load_sparse(tmp_path / "w.safetensors")
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    exact = (tmp_path / "w.safetensors").stat().st_size
    assert main([*line, "--half"]) == 0
    assert (tmp_path / "w.safetensors").stat().st_size < exact < checkpoint.stat().st_size


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.pth", *WORDS, "--output", "x.onnx"], "no checkpoint at missing.pth"),
        (["CHECKPOINT", "--model", "vit_tinny", "--output", "x.onnx"], "timm has no such model"),
        (["CHECKPOINT", "--model", "resnet18", "--output", "x.onnx"], "does not fit resnet18"),
        (["CHECKPOINT", *WORDS, "--output", "x.tflite"], "unknown ending"),
        (["CHECKPOINT", *WORDS, "--output", "nowhere/x.onnx"], "there is no folder nowhere"),
        (["CHECKPOINT", *WORDS, "--output", "x.pt", "--format", "semi_structured"], "end in .safetensors"),
        (["CHECKPOINT", *WORDS, "--output", "x.safetensors", "--format", "semi_structured"], "not a multiple of 32×64"),
        (["CHECKPOINT", *WORDS, "--output", "x.onnx", "--half"], "--half is for --format sparse, not onnx"),
        (["CHECKPOINT", *WORDS, "--output", "x.onnx", "--img-size", "17"], "does not accept images of (3, 17, 17)"),
    ],
)
def test_mistakes(words: list[str], told: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *(str(checkpoint) if w == "CHECKPOINT" else w for w in words)]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown


def wide(columns: int = 64, rows: int = 64) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, 1:3] = 0
    return layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_semi_structured_form_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name, sizes = "vit_tiny_patch16_224", {"img_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2}
    model = timm.create_model(name, **sizes)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.view(-1, 4)[:, 1:3] = 0
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = ["--model", name, "--model-kwargs", *(f"{key}={value}" for key, value in sizes.items())]
    line = ["export", str(tmp_path / "w.safetensors"), *words, "--format", "semi_structured"]
    assert main([*line, "--output", str(tmp_path / "x.safetensors")]) == 2
    assert "torch finds none here; 1 layers are 2:4" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_what_sparse_tensor_cores_take() -> None:
    torn = wide()
    with torch.no_grad():
        torn.weight[3, :3] = 1
    conv = nn.Conv2d(64, 64, 1)
    with torch.no_grad():
        conv.weight[:, ::2] = 0
    layers = nn.ModuleDict(
        {
            "fits": wide(),
            "torn": torn,
            "narrow": wide(32),
            "classes": wide(64, 10),
            "conv": conv,
            "dense": nn.Linear(64, 64),
        }
    )
    fit, unfit = semi_structured.two_of_four(layers)
    assert fit == ["fits"]
    assert set(unfit) == {"torn", "narrow", "classes", "conv"}
    assert unfit["torn"] == "1 of 1,024 groups of four keep more than two weights"
    assert unfit["classes"] == "10×64 is not a multiple of 32×64"
    with pytest.raises(ValueError, match="no Linear layer of this model has 2:4 weights \\(there are no zeros\\)"):
        semi_structured.to_semi_structured(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="fits is on cpu"):
        semi_structured.to_semi_structured(layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_semi_structured_on_a_gpu() -> None:
    model = nn.Sequential(wide(), wide(64, 10)).half().cuda()
    x = torch.randn(8, 64, device="cuda").half()
    expected = model(x)
    assert semi_structured.to_semi_structured(model) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_equal_weights_are_stored_once_and_lose_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.zero_()
        model[2].weight.zero_()
    assert export.to_onnx(model, tmp_path / "m.onnx", (3, 2, 2), tolerance=1).zeros == 288


def test_a_zero_that_the_file_has_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), wide(12, 8))
    lose = torch.onnx.export

    def careless(exported: nn.Sequential, *args: object, **kwargs: object) -> None:
        with torch.no_grad():
            exported[1].weight[0, 1] = 1e-12
        lose(exported, *args, **kwargs)
        with torch.no_grad():
            exported[1].weight[0, 1] = 0

    monkeypatch.setattr(torch.onnx, "export", careless)
    with pytest.raises(RuntimeError, match=r"lost zeros of 1\.weight"):
        export.to_onnx(model, tmp_path / "m.onnx", (3, 2, 2))
    assert list(tmp_path.iterdir()) == []


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm, self.both = nn.RMSNorm(6), nn.RMSNorm((3, 6), eps=1e-5, elementwise_affine=False)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs(self.both(self.norm(self.inputs(x)))).mean(1)


def test_rms_norms_are_exported(tmp_path: Path) -> None:
    assert export.to_onnx(Normed(), tmp_path / "m.onnx", (3, 4)).difference < 1e-5


def test_timms_rms_norms_are_exported(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_zepto_rms", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    assert export.to_onnx(model, tmp_path / "m.onnx", (3, 32, 32)).difference < 1e-4


def test_an_operator_that_onnx_has_not_is_one_line(tmp_path: Path) -> None:
    class Bessel(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(super().forward(x))

    with pytest.raises(RuntimeError, match=r"cannot be written as ONNX \(opset 16\): .*bessel_j0") as found:
        export.to_onnx(Bessel(4, 3), tmp_path / "m.onnx", (4,))
    assert len(str(found.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_transposed_convolutions_attention_and_recurrent_layers_keep_their_zeros(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gru = nn.ConvTranspose2d(3, 8, 2), nn.GRU(8, 8, batch_first=True)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.gru(self.up(x).flatten(2).transpose(1, 2))[0]
            return self.attn(h, h, h, need_weights=False)[0].mean(1)

    model = Mixed().eval()
    capruner.prune(model, None, method="magnitude").apply(model)
    assert export.to_onnx(model, tmp_path / "m.onnx", (3, 2, 2)).zeros > 300

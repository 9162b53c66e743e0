"""Which weights are those of linear layers, where their inputs are, and what is said of the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.core.patterns import Pattern
from capruner.deploy.semi_structured import two_of_four
from capruner.models.mask_types import unsupported
from capruner.models.weights import left_dense, linear_weights


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Language(nn.Module):
    """A GPT-2 in small: a tied head, positions, Conv1D layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.c_fc, self.c_proj, self.norm = Conv1D(16, 8), Conv1D(8, 16), nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.lm_head(self.norm(x + self.c_proj(self.c_fc(x).relu())))[:, -1]


def sentences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(20, (4, 5), generator=generator), torch.randint(20, (4,), generator=generator)) for _ in range(8)
    ]


LAYERS: list[tuple[nn.Module, dict[str, tuple[int, int]]]] = [
    (nn.Linear(6, 4), {"weight": (1, 6)}),
    (nn.Bilinear(3, 5, 2), {"weight": (2, 5)}),
    (nn.Conv1d(4, 6, 3, groups=2), {"weight": (1, 2)}),
    (nn.Conv3d(4, 6, 2), {"weight": (1, 4)}),
    (nn.ConvTranspose1d(4, 6, 3), {"weight": (0, 4)}),
    (nn.ConvTranspose2d(8, 6, 3, groups=2), {"weight": (0, 4)}),
    (nn.ConvTranspose3d(4, 6, 2), {"weight": (0, 4)}),
    (nn.MultiheadAttention(4, 2), {"in_proj_weight": (1, 4), "out_proj.weight": (1, 4)}),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        {"q_proj_weight": (1, 4), "k_proj_weight": (1, 3), "v_proj_weight": (1, 5), "out_proj.weight": (1, 4)},
    ),
    (nn.RNN(3, 4), {"weight_ih_l0": (1, 3), "weight_hh_l0": (1, 4)}),
    (nn.LSTM(3, 4, proj_size=2), {"weight_ih_l0": (1, 3), "weight_hh_l0": (1, 2), "weight_hr_l0": (1, 4)}),
    (nn.GRUCell(3, 4), {"weight_ih": (1, 3), "weight_hh": (1, 4)}),
    (Conv1D(6, 4), {"weight": (0, 4)}),
]


@pytest.mark.parametrize(("layer", "expected"), LAYERS, ids=lambda value: type(value).__name__)
def test_weights_of_linear_layers_and_where_their_inputs_are(layer: nn.Module, expected: dict[str, Any]) -> None:
    found = linear_weights(layer)
    assert {name: (w.inputs, w.reduction) for name, w in found.items()} == expected
    result = capruner.prune(layer, None, method="magnitude")
    assert list(result.masks()) == [name for name, _ in layer.named_parameters() if name in expected]
    assert result.settings["left_dense"] == []


@pytest.mark.parametrize(
    "layer", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4), nn.LayerNorm((3, 4)), nn.BatchNorm2d(4), nn.ReLU()]
)
def test_other_layers_have_none(layer: nn.Module) -> None:
    assert linear_weights(layer) == {}


def test_all_weights_of_torchvisions_transformer() -> None:
    transformer = pytest.importorskip("torchvision.models").VisionTransformer
    model = transformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
    result = capruner.prune(model, None, sparsity=0.9, method="magnitude")
    prunable, overall = result.model_sparsity()
    assert prunable == pytest.approx(0.9, abs=1e-3)
    assert overall > 0.8
    assert [(row["name"], row["reason"]) for row in result.settings["left_dense"]] == [
        ("class_token", "a parameter of VisionTransformer, which is not a known linear layer"),
        ("encoder.pos_embedding", "a parameter of Encoder, which is not a known linear layer"),
    ]


@pytest.mark.promise(
    "Models and masks", "Weights with two or more dimensions that are left dense are listed with a reason"
)
def test_what_stays_dense_and_why(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = Language()
    with caplog.at_level(logging.INFO, "capruner"):
        result = capruner.prune(model, sentences(), num_grads=8, exclude=["c_fc"], progress=False)
    assert list(result.masks()) == ["c_proj.weight"]
    rows = {row["name"]: row for row in result.settings["left_dense"]}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "wte.weight": "tied to the embedding wte",
        "wpe.weight": "an embedding",
        "c_fc.weight": "excluded",
    }
    assert rows["wte.weight"] == {
        "name": "wte.weight",
        "shape": [20, 8],
        "numel": 160,
        "reason": "tied to the embedding wte",
    }
    lines = [record for record in caplog.records if "left dense" in record.message]
    assert [record.levelname for record in lines] == ["WARNING"]  # the embeddings are more than 5 % of all weights
    assert "128 of the model's 504 weights (25.4 %)" in lines[0].message
    assert "wte.weight (160: tied to the embedding wte)" in lines[0].message
    result.save(tmp_path / "r.safetensors")
    assert capruner.load_result(tmp_path / "r.safetensors").settings["left_dense"] == result.settings["left_dense"]
    parameters = {"c_fc.weight": model.c_fc.weight}
    assert [row["reason"] for row in left_dense(model, parameters)][-1] == "not in params"


def test_what_the_caller_left_out_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40))
    with caplog.at_level(logging.INFO, "capruner"):
        result = capruner.prune(model, None, method="magnitude", params="0")
    assert [row["reason"] for row in result.settings["left_dense"]] == ["not in params"]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_tied_head_that_is_named_is_pruned() -> None:
    result = capruner.prune(Language(), sentences(), num_grads=8, params=["lm_head"], progress=False)
    assert list(result.masks()) == ["wte.weight"]
    assert not any(row["name"] == "wte.weight" for row in result.settings["left_dense"])


def test_reasons_for_frozen_and_unfit_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    data = [(torch.randn(4, 8), torch.arange(4) % 3)] * 4
    result = capruner.prune(model, data, mask_type="2:4", num_grads=4, skip_unsupported=True, progress=False)
    assert {row["name"]: row["reason"] for row in result.settings["left_dense"]} == {
        "0.weight": "frozen (requires_grad is False)",
        "2.weight": "cannot hold 2:4",
    }
    assert sum("0.weight: frozen" in record.message for record in caplog.records) == 1
    assert "0.weight" in capruner.prune(model, None, method="magnitude").masks()
    assert not model[0].weight.requires_grad
    with torch.no_grad():
        model[0].weight[0] = 0
    assert list(capruner.mask_model(model).masks) == ["0.weight"]
    with pytest.raises(ValueError, match=r"frozen.*0\.weight.*requires_grad_"):
        capruner.prune(model, data, params=["0.weight"], num_grads=4)


# N:M along the inputs


@pytest.mark.parametrize("method", ["magnitude", "cap", "fast_cap", "obs"])
@pytest.mark.parametrize("kind", ["conv1d", "transposed", "grouped"])
def test_two_of_four_runs_along_the_inputs(method: Any, kind: str) -> None:
    layer: nn.Module
    if kind == "conv1d":
        layer, x, classes = Conv1D(6, 8), torch.randn(16, 8), 6
    else:
        groups = 2 if kind == "grouped" else 1
        layer, x, classes = nn.ConvTranspose2d(8, 6, 2, groups=groups), torch.randn(16, 8, 3, 3), 6
    model = nn.Sequential(layer, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()) if x.dim() > 2 else layer
    data = [(x, torch.arange(16) % classes)] * 12
    result = capruner.prune(model, data, mask_type="2:4", method=method, num_grads=12, progress=False)
    mask = next(iter(result.masks().values()))
    assert (mask.movedim(0, -1).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()


def test_the_inputs_of_a_transposed_group_have_to_fit() -> None:
    layer = nn.ConvTranspose2d(12, 4, 1, groups=2)
    assert unsupported(Pattern(2, 4), dict(layer.named_parameters()), linear_weights(layer)) == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"these are not: weight \(12, 2, 1, 1\)"):
        capruner.prune(layer, None, method="magnitude", mask_type="2:4")


def test_a_conv1d_is_pruned_like_the_linear_layer_that_it_is() -> None:
    """The same masks and weights as the transposed Linear: blocks hold the inputs of a neuron."""
    conv, linear = Conv1D(6, 8), nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 8, generator=generator), torch.randint(6, (4,), generator=generator)) for _ in range(20)]
    for mask_type in ("unstructured", "2:4", "block4"):
        for size in (None, 8, 16):
            found, expected = (
                capruner.prune(m, data, num_grads=20, mask_type=mask_type, fisher_block_size=size, progress=False)
                for m in (conv, linear)
            )
            assert torch.equal(found.masks()["weight"].T, expected.masks()["weight"])
            torch.testing.assert_close(found.level().weights["weight"].T, expected.level().weights["weight"])


def test_two_of_four_for_sparse_tensor_cores_is_a_linear_layers() -> None:
    model = nn.Sequential(Conv1D(32, 64), nn.ConvTranspose2d(4, 4, 1), nn.Linear(64, 32))
    capruner.prune(model, None, method="magnitude", mask_type="2:4").apply(model)
    fit, unfit = two_of_four(model)
    assert fit == ["2"]
    assert unfit == {
        "0": "torch has no 2:4 kernel for Conv1D",
        "1": "torch has no 2:4 kernel for ConvTranspose2d",
    }


def test_transformers_own_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    result = capruner.prune(model, None, method="magnitude", mask_type="2:4")
    assert "transformer.h.0.mlp.c_fc.weight" in result.masks()
    assert "transformer.wte.weight" not in result.masks()
    mask = result.masks()["transformer.h.0.mlp.c_fc.weight"]
    assert (mask.T.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()


def test_gradients_of_recurrent_and_attention_layers() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.attn = nn.GRU(4, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.gru(x)[0]
            return self.attn(h, h, h)[0].mean(dim=1)

    data = [(torch.randn(4, 5, 4), torch.arange(4))] * 8
    result = capruner.prune(Sequence(), data, F.cross_entropy, 0.5, num_grads=8, progress=False)
    assert list(result.masks()) == [
        "gru.weight_ih_l0",
        "gru.weight_hh_l0",
        "attn.in_proj_weight",
        "attn.out_proj.weight",
    ]

"""Multiply-adds by weight, of attention and recurrent layers too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner


class Attend(nn.Module):
    """Attention over five tokens of eight features, as torch writes it."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **more)

    def forward(self, x: Tensor) -> Tensor:
        context = x[..., : self.attn.kdim]
        return self.attn(x, context, context[..., : self.attn.vdim], need_weights=False)[0]


@pytest.mark.parametrize("more", [{}, {"kdim": 6, "vdim": 4}])
def test_attention_layers(more: Any) -> None:
    used = capruner.multiply_adds(Attend(**more), (5, 8))
    if more:
        assert used.weights == {
            "attn.q_proj_weight": 5 * 64,
            "attn.k_proj_weight": 5 * 8 * 6,
            "attn.v_proj_weight": 5 * 8 * 4,
            "attn.out_proj.weight": 5 * 64,
        }
    else:
        assert used.weights == {"attn.in_proj_weight": 5 * 192, "attn.out_proj.weight": 5 * 64}
    assert used.activations == 2 * 5 * 5 * 8


def test_encoder_layers_and_the_fused_function() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    used = capruner.multiply_adds(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (5, 8))
    assert used.weights["layers.1.self_attn.in_proj_weight"] == 5 * 192
    assert used.weights["layers.0.linear1.weight"] == 5 * 8 * 16
    assert used.activations == 2 * 2 * 5 * 5 * 8

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    assert capruner.multiply_adds(Fused(), (5, 8)).activations == 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recurrent_layers(kind: Any, gates: int, device: str) -> None:
    used = capruner.multiply_adds(kind(6, 8, num_layers=2, batch_first=True).to(device), (5, 6))
    rows = 5 * gates * 8
    assert used.weights == {
        "weight_ih_l0": rows * 6,
        "weight_hh_l0": rows * 8,
        "weight_ih_l1": rows * 8,
        "weight_hh_l1": rows * 8,
    }


def test_costs_of_torchvisions_transformer() -> None:
    transformer = pytest.importorskip("torchvision.models").VisionTransformer
    model = transformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 2])) for _ in range(8)]
    costs = capruner.multiply_adds(model, (3, 8, 8)).per_weight(model)
    assert costs["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] == 5  # tokens
    result = capruner.prune(model, batches, num_grads=8, costs=costs, progress=False)
    assert "encoder.layers.encoder_layer_0.mlp.0.weight" in result.masks()


def test_one_vector_without_a_batch_of_rows() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x[0], self.fc.weight) + self.fc(x[0])

    assert capruner.multiply_adds(Vector(), (4,)).weights == {"fc.weight": 24}

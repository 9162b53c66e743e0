"""Which units of a network can be removed: found by trying, refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.shrinking.run import find_units

timm = pytest.importorskip("timm")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}


class Mlp(nn.Module):
    """Two layers with a function of the hidden values between them."""

    def __init__(self, between: Any, hidden: int = 6, read: int = 6) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(4, hidden), nn.Linear(read, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def test_an_mlp_has_neurons_whatever_its_code_looks_like() -> None:
    for between in (F.gelu, torch.tanh, nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), lambda x: x * x.sigmoid()):
        groups, left = find_units(Mlp(between).eval(), torch.randn(2, 5, 4), ["neurons"])
        assert [(group.name, group.kind, group.units) for group in groups] == [("first", "neurons", 6)]
        assert not left


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (Mlp(nn.LayerNorm(6)), "mixed with each other"),
        (Mlp(lambda x: x.softmax(dim=-1)), "mixed with each other"),
        (Mlp(lambda x: x.mean(dim=1, keepdim=True).expand_as(x)), "mixed with each other"),
        (Mlp(lambda x: x.flatten(1), read=6), "rearranged"),
        (Mlp(lambda x: x.chunk(2, dim=-1)[0], read=3), "3 inputs for its 6 outputs"),
        (Mlp(lambda x: 0 * x.detach()), "do not reach"),
    ],
)
def test_what_is_not_an_mlp_is_named(mlp: Mlp, reason: str) -> None:
    x = torch.randn(2, 1, 4) if "rearranged" in reason else torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=f"first: .*{reason}"):
        find_units(mlp.eval(), x, ["neurons"])


def test_neurons_that_something_else_reads_remain() -> None:
    class Twice(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden.relu()) + hidden[..., :3]

    with pytest.raises(ValueError, match="read by more than second"):
        find_units(Twice(None).eval(), torch.randn(2, 4), ["neurons"])


def test_shared_and_computed_weights_remain() -> None:
    tied = Mlp(F.relu)
    tied.other = nn.Linear(6, 3)
    tied.other.weight = tied.second.weight
    with pytest.raises(ValueError, match="weights of second are shared"):
        find_units(tied.eval(), torch.randn(2, 4), ["neurons"])
    normed = Mlp(F.relu)
    nn.utils.parametrizations.weight_norm(normed.second)
    with pytest.raises(ValueError, match="weight of second is computed"):
        find_units(normed.eval(), torch.randn(2, 4), ["neurons"])


def test_neurons_that_a_parameter_outside_of_layers_scales_remain() -> None:
    class Scaled(Mlp):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu() * self.scale)

    with pytest.raises(ValueError, match="first: without one of them, The size of tensor"):
        find_units(Scaled().eval(), torch.randn(2, 4), ["neurons"])


def test_frozen_readers_remain() -> None:
    frozen = Mlp(F.relu)
    frozen.second.requires_grad_(False)
    with pytest.raises(ValueError, match="second is frozen"):
        find_units(frozen.eval(), torch.randn(2, 4), ["neurons"])


def test_a_vit_has_neurons_and_heads() -> None:
    groups, left = find_units(timm.create_model("vit_tiny_patch16_224", **VIT).eval(), IMAGES, ["neurons", "heads"])
    assert [(group.name, group.kind, group.units) for group in groups] == [
        ("blocks.0.attn", "heads", 4),
        ("blocks.0.mlp.fc1", "neurons", 96),
        ("blocks.1.attn", "heads", 4),
        ("blocks.1.mlp.fc1", "neurons", 96),
    ]
    assert not left


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Beit", "DeiT"])
def test_hugging_face_attention_has_heads(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=16, patch_size=4)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    groups, left = find_units(model, torch.randn(2, 3, 16, 16), ["heads"])
    assert [group.units for group in groups] == [4, 4]
    assert [len({cut.layer for cut in group.cuts}) for group in groups] == [4, 4]
    assert not left


def test_attention_with_a_table_per_head_is_left_alone() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=24, depths=(1, 1))
    with pytest.raises(ValueError, match="attn: without one of them"):
        find_units(model.eval(), IMAGES, ["heads"])


def test_grouped_query_attention_is_left_alone() -> None:
    class GroupedAttention(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).unflatten(-1, (4, 4)).transpose(-3, -2)
            k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).repeat_interleave(2, dim=2)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))

    with pytest.raises(ValueError, match="GroupedAttention has 16 \\+ 16 queries, keys and values for 4 heads"):
        find_units(nn.Sequential(GroupedAttention()).eval(), torch.randn(2, 5, 16), ["heads"])


def test_attention_of_other_kinds_is_left_alone_by_name() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    groups, left = find_units(model, torch.randn(2, 3, 8), ["neurons", "heads"])
    assert [group.name for group in groups] == ["linear1"]
    assert [item.name for item in left] == ["self_attn"]
    assert "nn.MultiheadAttention" in left[0].reason


def test_heads_that_a_norm_mixes_are_left_alone() -> None:
    attention = timm.layers.attention.Attention(16, 4, scale_norm=True, norm_layer=nn.LayerNorm).eval()
    with pytest.raises(ValueError, match="heads are mixed"):
        find_units(nn.Sequential(attention), torch.randn(2, 5, 16), ["heads"])


def test_exclude() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    groups, left = find_units(model, IMAGES, ["neurons", "heads"], ["blocks.0", "re:1.attn$"])
    assert [group.name for group in groups] == ["blocks.1.mlp.fc1"]
    assert [(item.name, item.reason) for item in left] == [
        ("blocks.0.mlp.fc1", "excluded"),
        ("blocks.0.attn", "excluded"),
        ("blocks.1.attn", "excluded"),
    ]
    with pytest.raises(ValueError, match="exclude: 'block' is not the name"):
        find_units(model, IMAGES, ["neurons"], "block")

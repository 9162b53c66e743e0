"""``capruner.shrink``: a smaller model that computes what its masked twin computes, trains, exports, and comes back from its file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from untouched import same, snapshot

import capruner
from capruner.shrinking.result import Shrunk

timm = pytest.importorskip("timm")

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 32, 32, generator=GENERATOR)
BATCHES = [
    (torch.randn(4, 3, 32, 32, generator=GENERATOR), torch.randint(0, 5, (4,), generator=GENERATOR)) for _ in range(6)
]


def vit() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


def shrink(model: nn.Module, **changes: Any) -> Shrunk:
    arguments: dict[str, Any] = {"macs": 0.5, "example_inputs": IMAGES, "num_grads": 6, "progress": False}
    return capruner.shrink(model, BATCHES, F.cross_entropy, **{**arguments, **changes})


@pytest.fixture(scope="module")
def small() -> Shrunk:
    return shrink(vit())


def test_the_target_is_met_in_multiply_adds(small: Shrunk) -> None:
    dense = capruner.multiply_adds(vit(), (3, 32, 32)).dense
    now = capruner.multiply_adds(small.model, (3, 32, 32)).dense
    assert 0.46 * dense < now <= 0.5 * dense
    assert small.costs["macs"] == (2 * dense, 2 * now)  # of two example images


def test_the_model_is_not_changed() -> None:
    model = vit().train()
    before = snapshot(model)
    small = shrink(model)
    assert same(before, snapshot(model))
    assert small.model.training


def test_outputs_are_those_of_the_masked_twin(small: Shrunk) -> None:
    twin = vit()
    weights = small.model.state_dict()
    for index, block in enumerate(twin.blocks):
        removed = {name: sides for name, sides in small.removal.layers.items() if name.startswith(f"blocks.{index}.")}
        names = [f"blocks.{index}.{name}" for name in ("mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj")]
        assert sorted(removed) == sorted(names)
        gone = {name: next(iter(removed[name].values())) for name in names}
        hidden = [i for i in range(96) if i not in gone[names[0]]]
        rows = [i for i in range(72) if i not in gone[names[2]]]
        inner = [i for i in range(24) if i not in gone[names[3]]]
        with torch.no_grad():
            for layer, size in ((block.mlp.fc1, hidden), (block.attn.qkv, rows)):
                name = names[0] if layer is block.mlp.fc1 else names[2]
                for key, tensor in (("weight", layer.weight), ("bias", layer.bias)):
                    assert torch.equal(tensor[size], weights[f"{name}.{key}"])  # rows are not re-fitted
                    tensor[gone[name]] = 0
            for layer, name, size in ((block.mlp.fc2, names[1], hidden), (block.attn.proj, names[3], inner)):
                assert not torch.equal(layer.weight[:, size], weights[f"{name}.weight"])  # columns are
                layer.weight.zero_()[:, size] = weights[f"{name}.weight"]
                assert torch.equal(layer.bias, weights[f"{name}.bias"])
    with torch.no_grad():
        assert torch.allclose(small.model(IMAGES), twin(IMAGES), atol=1e-5)


def test_it_comes_back_from_its_file(small: Shrunk, tmp_path: Path) -> None:
    small.save(tmp_path / "small.safetensors")
    dense = vit()
    before = snapshot(dense)
    again = capruner.load_shrunk(tmp_path / "small.safetensors", dense)
    assert same(before, snapshot(dense))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), small.model(IMAGES))


def test_heads_of_a_hugging_face_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def dense() -> nn.Module:
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
        return transformers.ViTForImageClassification(config).eval()

    small = capruner.shrink(dense(), BATCHES, units="heads", macs=0.8, example_inputs=IMAGES, num_grads=6)
    left = [row["left"] for row in small.rows]
    assert [row["kind"] for row in small.rows] == ["heads", "heads"]
    assert sum(left) < 8
    assert small.costs["macs"][1] <= 0.8 * small.costs["macs"][0]
    small.save(tmp_path / "small.safetensors")
    again = capruner.load_shrunk(tmp_path / "small.safetensors", dense())
    assert torch.equal(again(IMAGES).logits, small.model(IMAGES).logits)
    attentions = [m for m in again.modules() if type(m).__name__ == "ViTAttention"]
    assert [m.num_attention_heads for m in attentions] == left
    assert [m.q_proj.out_features for m in attentions] == [8 * count for count in left]


def test_it_trains_on_and_saves_what_it_became(tmp_path: Path) -> None:
    small = shrink(vit())
    optimizer = torch.optim.SGD(small.model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(small.model(BATCHES[0][0]), BATCHES[0][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    small.save(tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(capruner.load_shrunk(tmp_path / "small.safetensors", vit())(IMAGES), small.model(IMAGES))


def test_it_distills() -> None:
    dense = vit()
    with torch.no_grad():
        dense.head.weight.mul_(100)  # logits worth distilling: those of fresh weights are all nearly 0
    small = shrink(dense, macs=0.4)
    said = capruner.distill(small.model, dense, BATCHES, passes=10, progress=False)
    assert said.after < said.before


def test_it_exports_to_onnx(small: Shrunk, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from capruner.deploy.export import to_onnx

    to_onnx(copy.deepcopy(small.model), tmp_path / "small.onnx", (3, 32, 32))  # compares the outputs


def test_report(small: Shrunk) -> None:
    text = small.report()
    assert "blocks.0.mlp.fc1  neurons     96" in text
    dense, now = small.costs["macs"]
    assert f"macs        {dense:,.0f} -> {now:,.0f}, {now / dense:.1%}" in text
    assert sum(p.numel() for p in small.model.parameters()) == small.costs["parameters"][1]


def test_refit_beats_plain_removal() -> None:
    """On what the Fisher matrix was made for: inputs that depend on each other, so that one neuron can stand in for another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].weight.data = model[0].weight.data[:8].repeat(2, 1)
    model[0].bias.data = model[0].bias.data[:8].repeat(2)
    x = torch.randn(256, 4)
    target = model(x).detach()
    noisy = target + 0.1 * torch.randn_like(target)
    batches = [(a, b) for a, b in zip(x.split(8), noisy.split(8))]
    small = capruner.shrink(
        model, batches, F.mse_loss, macs=0.5, example_inputs=x[:2], num_grads=32, damp=1e-6, progress=False
    )
    assert small.rows[0]["left"] == 8
    # Eight different neurons remain, each with the outgoing weights of two.
    assert F.mse_loss(small.model(x), target) < 1e-6 < F.mse_loss(target, target.mean(dim=0).expand_as(target))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": 1.0}, "macs must be the share"),
        ({"macs": True}, "macs must be the share"),
        ({"macs": None}, "give one of macs"),
        ({"latency": 0.5}, "give one of macs"),
        ({"macs": None, "latency": 0}, "latency must be the share"),
        ({"macs": 0.001}, "out of reach"),
        ({"units": "weights"}, "units must be some of"),
        ({"units": []}, "units must be some of"),
        ({"units": "channels"}, "no channels to remove"),
        ({"num_grads": 0}, "num_grads must be a whole number"),
        ({"multiple_of": 0}, "multiple_of must be a whole number"),
        ({"damp": -1.0}, "damp must be a positive number"),
        ({"exclude": "nowhere"}, "exclude: 'nowhere'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(vit(), **changes)


def test_batches_are_needed() -> None:
    with pytest.raises(ValueError, match="batches must be an iterable"):
        capruner.shrink(vit(), None, macs=0.5, example_inputs=IMAGES)


def test_a_loss_without_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="every gradient of the calibration is exactly 0"):
        capruner.shrink(
            vit(), BATCHES, lambda out, y: 0 * out.sum(), macs=0.5, example_inputs=IMAGES, num_grads=2, progress=False
        )


def test_files_that_do_not_fit(small: Shrunk, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small.save(path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        small.save(tmp_path / "nowhere" / "small.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        capruner.load_shrunk(tmp_path / "other.safetensors", vit())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv has 60 outputs and 20 inputs"):
        capruner.load_shrunk(path, timm.create_model("vit_tiny_patch16_224", **{**VIT, "embed_dim": 20}))
    with pytest.raises(ValueError, match=r"has no layer blocks\.0\."):
        capruner.load_shrunk(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="another architecture"):
        capruner.load_shrunk(path, timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 6}))
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(path), plain)
    with pytest.raises(ValueError, match="not a model shrunk by capruner"):
        capruner.load_shrunk(plain, vit())
    content = path.read_bytes()
    for damaged in (content[:-4], content[:-4] + b"\1\2\3\4", content.replace(b'"version', b'"verzion', 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            capruner.load_shrunk(path, vit())


def test_metadata_is_json_that_names_what_is_gone(small: Shrunk, tmp_path: Path) -> None:
    from safetensors import safe_open

    small.save(tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["capruner"])
    assert header["heads"] == {r["name"]: r["left"] for r in small.rows if r["kind"] == "heads" and r["left"] < 4}
    assert len(header["layers"]["blocks.0.mlp.fc1"]["out"]) == 96 - small.rows[1]["left"]

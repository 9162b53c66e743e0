"""Models of many libraries, pruned by the documented call: random weights, small sizes, exact counts.

``pytest -s tests/test_any_model.py`` prints the rows of the table in docs/guide/any-model.md.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import capruner

SPARSITY, GRADIENTS = 0.5, 2
Make = Callable[[Any], tuple[nn.Module, Any]]
"""From a library's module to a model and one batch."""


@dataclass(frozen=True)
class Case:
    """A model, a batch, and what the call needs besides."""

    library: str
    make: Make
    call: dict[str, Any] = field(default_factory=dict)
    shown: str = ""


def _images(classes: int = 5, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, size, size), torch.tensor([0, classes - 1])


def _pixels(size: int = 32, **more: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 4])} | more


def _hf(config: str, model: str, batch: Callable[[], Any], **arguments: Any) -> Make:
    def make(transformers: Any) -> tuple[nn.Module, Any]:
        return getattr(transformers, model)(getattr(transformers, config)(**arguments)), batch()

    return make


_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": 5}


def _tokens(labels: bool = True) -> dict[str, Any]:
    ids = torch.randint(3, 60, (2, 8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if labels else {})


def _clip(transformers: Any) -> tuple[nn.Module, Any]:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=_VIT, projection_dim=16)
    batch = _tokens(labels=False) | {"pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}
    return transformers.CLIPModel(config), batch


def _gpt2(transformers: Any) -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), _tokens()


def _llama(transformers: Any) -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config), _tokens()


def _segformer(transformers: Any) -> tuple[nn.Module, Any]:
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(3, (2, 32, 32))}
    return transformers.SegformerForSemanticSegmentation(config), batch


def _bert(transformers: Any) -> tuple[nn.Module, Any]:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config), _tokens(False) | {"labels": torch.tensor([0, 2])}


def _timm(name: str, **arguments: Any) -> Make:
    def make(timm: Any) -> tuple[nn.Module, Any]:
        return timm.create_model(name, num_classes=5, **arguments), _images(size=arguments.get("img_size", 32))

    return make


def _classifier(name: str, size: int = 32, **arguments: Any) -> Make:
    def make(torchvision: Any) -> tuple[nn.Module, Any]:
        return getattr(torchvision.models, name)(weights=None, num_classes=5, **arguments), _images(size=size)

    return make


def _vision_transformer(torchvision: Any) -> tuple[nn.Module, Any]:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5), _images()


def _convnext(torchvision: Any) -> tuple[nn.Module, Any]:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=5), _images()


def _segmenter(torchvision: Any) -> tuple[nn.Module, Any]:
    name = "lraspp_mobilenet_v3_large"
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
    return model, (torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32)))


def _objects(size: int) -> Any:
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    return [torch.rand(3, size, size)], [target]


def _backbone(torchvision: Any) -> nn.Module:
    backbone: nn.Module = torchvision.models.mobilenet_v2(weights=None).features[:4]
    backbone.out_channels = 24  # type: ignore[assignment]
    return backbone


def _faster_rcnn(torchvision: Any) -> tuple[nn.Module, Any]:
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2)
    parts = {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
    model = torchvision.models.detection.FasterRCNN(
        _backbone(torchvision), num_classes=3, min_size=64, max_size=64, **parts
    )
    return model, _objects(64)


def _retinanet(torchvision: Any) -> tuple[nn.Module, Any]:
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))
    model = torchvision.models.detection.RetinaNet(
        _backbone(torchvision), num_classes=3, min_size=64, max_size=64, anchor_generator=anchors
    )
    return model, _objects(64)


def _ssd(torchvision: Any) -> tuple[nn.Module, Any]:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    return model, _objects(320)


def _video(torchvision: Any) -> tuple[nn.Module, Any]:
    kinds = torchvision.models.video.resnet
    makers = [kinds.Conv3DSimple, *[kinds.Conv3DNoTemporal] * 3]
    model = kinds.VideoResNet(kinds.BasicBlock, makers, [1, 1, 1, 1], kinds.BasicStem, num_classes=5)
    return model, (torch.randn(1, 3, 4, 32, 32), torch.tensor([1]))


def _smp(name: str) -> Make:
    def make(smp: Any) -> tuple[nn.Module, Any]:
        model = getattr(smp, name)("mobilenet_v2", encoder_weights=None, classes=3)
        return model, (torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32)))

    return make


def summed(losses: Any, targets: Any) -> Tensor:
    """The loss of a detection model: the sum of what it returns in training mode."""
    return sum(losses.values())  # type: ignore[no-any-return]


DETECTION: dict[str, Any] = {"loss_fn": summed, "batch_fn": lambda batch: (batch, None), "mode": "train"}
SHOWN = 'loss_fn=lambda losses, _: sum(losses.values()), batch_fn=lambda batch: (batch, None), mode="train"'
OUT: dict[str, Any] = {"loss_fn": lambda outputs, y: nn.functional.cross_entropy(outputs["out"], y)}
OUT_SHOWN = 'loss_fn=lambda outputs, y: cross_entropy(outputs["out"], y)'
T, V, S = "transformers", "torchvision", "segmentation_models_pytorch"

CASES = {
    "ViT": Case(T, _hf("ViTConfig", "ViTForImageClassification", _pixels, num_labels=5, **_VIT)),
    "DeiT": Case(T, _hf("DeiTConfig", "DeiTForImageClassification", _pixels, num_labels=5, **_VIT)),
    "BEiT": Case(T, _hf("BeitConfig", "BeitForImageClassification", _pixels, num_labels=5, **_VIT)),
    "DINOv2": Case(
        T,
        _hf(
            "Dinov2Config",
            "Dinov2ForImageClassification",
            _pixels,
            num_labels=5,
            **{k: v for k, v in _VIT.items() if k != "intermediate_size"},
        ),
    ),
    "Swin": Case(
        T,
        _hf(
            "SwinConfig",
            "SwinForImageClassification",
            _pixels,
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            num_labels=5,
        ),
    ),
    "ConvNeXt": Case(T, _hf("ConvNextConfig", "ConvNextForImageClassification", _pixels, **_STAGES)),
    "ResNet": Case(
        T, _hf("ResNetConfig", "ResNetForImageClassification", _pixels, embedding_size=8, layer_type="basic", **_STAGES)
    ),
    "CLIP, two towers": Case(T, _clip),
    "GPT-2": Case(T, _gpt2),
    "Llama": Case(T, _llama),
    "BERT": Case(T, _bert),
    "SegFormer": Case(T, _segformer),
    "VisionTransformer": Case(V, _vision_transformer),
    "ConvNeXt, torchvision's": Case(V, _convnext),
    "mobilenet_v3_small": Case(V, _classifier("mobilenet_v3_small", 64)),
    "shufflenet_v2_x0_5": Case(V, _classifier("shufflenet_v2_x0_5")),
    "squeezenet1_1": Case(V, _classifier("squeezenet1_1", 64)),
    "mnasnet0_5": Case(V, _classifier("mnasnet0_5")),
    "lraspp_mobilenet_v3_large": Case(V, _segmenter, OUT, OUT_SHOWN),
    "FasterRCNN": Case(V, _faster_rcnn, DETECTION, SHOWN),
    "RetinaNet": Case(V, _retinanet, DETECTION, SHOWN),
    "ssdlite320_mobilenet_v3_large": Case(V, _ssd, DETECTION, SHOWN),
    "VideoResNet": Case(V, _video),
    "Unet": Case(S, _smp("Unet")),
    "FPN": Case(S, _smp("FPN")),
    "Linknet": Case(S, _smp("Linknet")),
    "vit_tiny_patch16_224": Case(
        "timm", _timm("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    ),
    "levit_128s": Case("timm", _timm("levit_128s", img_size=64)),
    "regnety_002": Case("timm", _timm("regnety_002")),
}


def build(case: Case) -> tuple[nn.Module, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = importlib.import_module(case.library)
        torch.manual_seed(0)
        return case.make(library)


def pruned(model: nn.Module, batch: Any, call: dict[str, Any]) -> capruner.PruningResult:
    """The documented call."""
    loader: Iterable[Any] = [batch]
    return capruner.prune(
        model,
        loader,
        sparsity=SPARSITY,
        method="fast_cap",
        global_sparsity=False,
        num_grads=GRADIENTS,
        fisher_block_size=16,
        progress=False,
        **call,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_pruned_to_the_exact_count(name: str) -> None:
    case = CASES[name]
    pytest.importorskip(case.library, exc_type=ImportError)
    model, batch = build(case)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = pruned(model, batch, case.call)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # statistics of BatchNorm too
    assert model.training
    result.apply(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masks = result.masks()
    assert [int((~mask).sum()) for mask in masks.values()] == [
        round(SPARSITY * mask.numel()) for mask in masks.values()
    ]
    assert all(bool((parameters[key][~mask] == 0).all()) for key, mask in masks.items())
    total, zeros = sum(mask.numel() for mask in masks.values()), sum(int((~mask).sum()) for mask in masks.values())
    assert total > 0.3 * sum(p.numel() for p in model.parameters())
    shown = f"`{case.shown}`" if case.shown else "none"
    print(f"\n| {case.library} | {name} | {total:,} | {zeros:,} | {shown} |")

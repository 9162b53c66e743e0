"""Zeros of a parameter have to be zeros of what is multiplied."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.models.computed import loses_zeros, lost_zeros
from capruner.models.selection import SelectionError


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return self._conv_forward(x, (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class ByBatchNorm(nn.Conv2d):
    """As timm's ScaledStdConv2d: standardised by F.batch_norm, with a gain."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(w, None, None, weight=self.gain.view(-1), training=True).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias)


class InConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.1, self.bias)


class Softmax(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.softmax(dim=1).T


class Equalised(nn.Linear):
    """Keeps zeros: a learning rate that is equalised."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (2 / self.in_features) ** 0.5, self.bias)


class Normed(nn.Linear):
    """Keeps zeros: rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Gain(nn.Conv2d):
    """Keeps zeros: a gain per channel, and a cast."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight * self.gain).double().float(), self.bias)


LOSING = [Standardised(3, 4, 3), ByBatchNorm(3, 4, 3), InConvForward(3, 4, 3), Shifted(5, 4), Softmax(5, 4)]
KEEPING = [Equalised(5, 4), Normed(5, 4), Gain(3, 4, 3), nn.Linear(5, 4), nn.Conv2d(3, 4, 3, groups=1)]


@pytest.mark.parametrize("layer", LOSING + KEEPING, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_seen_without_data(layer: nn.Module, device: str) -> None:
    if device == "meta":
        layer = type(layer)(*((3, 4, 3) if isinstance(layer, nn.Conv2d) else (5, 4))).to("meta")
    assert loses_zeros(layer) == (type(layer) in map(type, LOSING))


def net(layer: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    shape = (6, 3, 5, 5) if isinstance(layer, nn.Conv2d) else (6, 5)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if isinstance(layer, nn.Conv2d) else []
    return nn.Sequential(layer, nn.ReLU(), *pool, nn.Linear(4, 3)), [(torch.randn(shape), torch.arange(6) % 3)] * 4


@pytest.mark.promise(
    "Models and masks",
    "A layer that computes another weight from its parameter is left dense with a warning, or refused where it is named",
)
@pytest.mark.parametrize("layer", LOSING, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("method", ["magnitude", "cap"])
def test_they_are_left_dense_or_refused_by_name(
    layer: nn.Module, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = net(layer)
    call = {"method": method, "num_grads": 4, "progress": False}
    batches = data if method == "cap" else None
    result = capruner.prune(model, batches, **call)
    assert len(result.masks()) == 1
    assert [row["name"] for row in result.settings["left_dense"] if row["numel"] > 12][:1] == ["0.weight"]
    assert "would not be zeros" in next(r["reason"] for r in result.settings["left_dense"] if r["name"] == "0.weight")
    assert any(record.levelname == "WARNING" and "0.weight" in record.message for record in caplog.records)
    for params in ("0.weight", "0", "re:.*weight"):
        with pytest.raises(SelectionError, match=r"0\.weight"):
            capruner.prune(model, batches, params=params, **call)
    assert len(capruner.prune(model, batches, params="re:.*weight", exclude="0", **call).masks()) == 1


@pytest.mark.parametrize("layer", KEEPING, ids=lambda layer: type(layer).__name__)
def test_layers_that_scale_are_pruned(layer: nn.Module) -> None:
    model, data = net(layer)
    assert "0.weight" in capruner.prune(model, data, num_grads=4, progress=False).masks()


class Around(nn.Module):
    """The model and not the layer computes the weight, and draws random numbers meanwhile."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.fc, self.head, self.change = nn.Linear(5, 16), nn.Linear(16, 3), change
        self.latent = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not torch._C._functorch.peek_interpreter_stack():  # vmap does not let a model change its buffers
            self.calls += 1
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        w = self.fc.weight
        if self.change == "centre":
            w = w - w.mean()
        elif self.change == "low rank":
            w = w + torch.ones(16, 2) @ torch.ones(2, 5)
        elif self.change == "scale":
            w = w * torch.tensor(2.0) / w.norm()
        elif self.change == "latent":  # an activation of constants is no weight
            return self.head(x @ self.fc(self.latent).mean(dim=0)[:5, None] + self.fc(x))
        return self.head(F.linear(x, w, self.fc.bias))


@pytest.mark.parametrize("gradients", ["batch", "sample"])
@pytest.mark.parametrize("change", ["centre", "low rank", "scale", "latent"])
def test_the_first_batch_shows_what_surroundings_do(change: str, gradients: Any) -> None:
    model = Around(change)
    data = [(torch.randn(4, 5), torch.arange(4) % 3)] * 4
    call = {"num_grads": 4, "gradients": gradients, "progress": False}
    if change in ("scale", "latent"):
        assert "fc.weight" in capruner.prune(model, data, **call).masks()
        return
    with pytest.raises(ValueError, match=r"computes other weights from fc\.weight .*exclude=\['fc\.weight'\]"):
        capruner.prune(model, data, **call)
    assert model.calls == 0
    assert list(capruner.prune(model, data, exclude="fc", **call).masks()) == ["head.weight"]


def test_the_look_leaves_no_trace() -> None:
    model = Around("centre")
    x = torch.randn(4, 5)
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    assert lost_zeros(model, {"fc.weight": model.fc.weight}, lambda m: m(x)) == ["fc.weight"]
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert model.calls == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert model.training


def test_parametrizations() -> None:
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ):
        model, data = net(wrap(nn.Linear(5, 4)))
        result = capruner.prune(model, data, num_grads=4, progress=False)
        assert list(result.masks()) == ["2.weight"]
        reasons = [row["reason"] for row in result.settings["left_dense"]]
        assert all("computed from it" in reason or "computes a weight from it" in reason for reason in reasons)
    with pytest.raises(ValueError, match="computes a weight from it in which its zeros would not be zeros"):
        capruner.prune(model, data, params="0.parametrizations.weight.original", num_grads=4, progress=False)
    model, data = net(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))
    direction = "0.parametrizations.weight.original1"  # scaling it keeps its zeros
    assert list(capruner.prune(model, data, params=direction, num_grads=4, progress=False).masks()) == [direction]


@pytest.mark.parametrize("name", ["test_nfnet", "resnetv2_18"])
def test_timm_models_with_standardised_convolutions(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip("not in this version")
    with torch.device("meta"):
        model = timm.create_model(name)
    rows = left = [name for name in dict(model.named_parameters()) if name.endswith("conv1.weight")]
    from capruner.models.selection import select

    selection = select(model, "__ALL_PRUNABLE__")
    standardised = name == "test_nfnet"
    assert bool(set(left) & set(selection.passed)) == standardised
    assert bool(set(rows) & set(selection.parameters)) != standardised

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import same, snapshot

from capruner.batches import Batches, ModelInputs
from capruner.calibration.gradients import gradient_slabs
from capruner.calibration.stream import CalibrationStream
from capruner.models.modes import eval_mode


class Attention(nn.Module):
    """Fused attention, which vmap has no batching rule for, with LayerNorm around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(dim=1))


def conv_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )
    with torch.no_grad():  # statistics that are not those of a fresh layer
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def images(count: int, size: int = 4, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 6, 6, dtype=dtype), torch.randint(3, (size,))) for _ in range(count)]


def tokens(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 5, 8), torch.randint(3, (size,))) for _ in range(count)]


def vectors(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 5), torch.randint(3, (size,))) for _ in range(count)]


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}


def stream(data: Any) -> CalibrationStream:
    return CalibrationStream(Batches(data), torch.device("cpu"))


def collect(model: nn.Module, data: Any, num_grads: int, loss: Any = F.cross_entropy, **more: Any) -> dict[str, Tensor]:
    params = more.pop("parameters", None) or weights(model)
    with eval_mode(model):
        slabs = [
            {name: rows.clone() for name, rows in slab.items()}
            for slab in gradient_slabs(model, stream(data), loss, params, num_grads, progress=False, **more)
        ]
    return {name: torch.cat([slab[name] for slab in slabs]) for name in params}


def autograd(model: nn.Module, x: Any, y: Tensor) -> dict[str, Tensor]:
    params = weights(model)
    modes = [m.training for m in model.modules()]
    model.eval()
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values()))
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    return dict(zip(params, gradients))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list]]] = {
    "attention": (Attention, tokens),
    "conv+bn": (conv_net, images),
}


@pytest.mark.parametrize("kind", MODELS)
def test_batch_gradients_are_autograd_s(kind: str) -> None:
    make, draw = MODELS[kind]
    model, data = make(), draw(5)
    rows = collect(model, data, 5, slab=2)
    for index, (x, y) in enumerate(data):
        for name, gradient in autograd(model, x, y).items():
            assert torch.equal(rows[name][index], gradient)


@pytest.mark.parametrize("kind", MODELS)
def test_sample_gradients_are_those_of_one_sample_at_a_time(kind: str) -> None:
    make, draw = MODELS[kind]
    model, data = make(), draw(3, size=5)
    rows = collect(model, data, 13, mode="sample", slab=3)
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    for index, (x, y) in enumerate(samples[:13]):
        for name, gradient in autograd(model, x, y).items():
            torch.testing.assert_close(rows[name][index], gradient, rtol=1e-4, atol=1e-6)
    assert all(len(r) == 13 for r in rows.values())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["batch", "sample"]), st.integers(1, 12), st.integers(1, 20), st.integers(1, 5))
def test_slabs_of_any_size_hold_the_same_gradients(mode: str, num_grads: int, slab: int, size: int) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), vectors(12, size)
    expected = collect(model, data, num_grads, mode=mode, slab=1)["weight"]
    sizes = []
    with eval_mode(model):
        got = []
        for s in gradient_slabs(
            model, stream(data), F.cross_entropy, weights(model), num_grads, mode=mode, slab=slab, progress=False
        ):  # type: ignore[arg-type]
            got.append(s["weight"].clone())
            sizes.append(len(s["weight"]))
    assert max(sizes) <= slab
    assert sum(sizes) == num_grads
    torch.testing.assert_close(torch.cat(got), expected)


def test_only_as_many_batches_are_drawn_as_needed() -> None:
    def counted(data: list, drawn: list[int]) -> Iterator[Any]:
        for item in data:
            drawn.append(1)
            yield item

    for mode, needed in (("batch", 6), ("sample", 2)):
        drawn: list[int] = []
        collect(nn.Linear(5, 3), counted(vectors(10), drawn), 6, mode=mode)
        assert len(drawn) == needed


def test_an_iterator_goes_on_and_a_list_starts_anew() -> None:
    model, data = nn.Linear(5, 3), vectors(6)
    stream = iter(data)
    first, second = collect(model, stream, 3)["weight"], collect(model, stream, 3)["weight"]
    assert torch.equal(torch.cat([first, second]), collect(model, data, 6)["weight"])
    assert torch.equal(collect(model, data, 3)["weight"], first)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float32)]
)
def test_dtypes(mode: str, dtype: torch.dtype, out: torch.dtype) -> None:
    model, data = conv_net().to(dtype), images(3, dtype=dtype)
    rows = collect(model, data, 3, mode=mode)
    assert all(r.dtype == out for r in rows.values())
    x, y = data[0] if mode == "batch" else (data[0][0][:1], data[0][1][:1])
    for name, gradient in autograd(model, x, y).items():
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(rows[name][0], gradient.to(out), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_gradients_also_under_no_grad(mode: str) -> None:
    model, data = nn.Linear(5, 3), vectors(4)
    expected = collect(model, data, 4, mode=mode)["weight"]
    with torch.no_grad():
        assert torch.equal(collect(model, data, 4, mode=mode)["weight"], expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_some_parameters_frozen_or_not_selected(mode: str) -> None:
    model, data = conv_net(), images(2)
    model[0].weight.requires_grad_(False)
    rows = collect(model, data, 2, mode=mode, parameters={"5.weight": model[5].weight})
    assert list(rows) == ["5.weight"]
    assert not model[0].weight.requires_grad


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_tied_parameters_get_the_sum_of_their_uses(mode: str) -> None:
    model, data = Shared(), vectors(2, size=1)
    rows = collect(model, data, 2, mode=mode)
    assert list(rows) == ["a.weight"]
    for index, (x, y) in enumerate(data):
        torch.testing.assert_close(rows["a.weight"][index], autograd(model, x, y)["a.weight"])


# How a batch may look


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x) * scale[:, None]


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda x, s: (x, s),
        lambda x, s: [x, s],
        lambda x, s: {"x": x, "scale": s},
        lambda x, s: ModelInputs((x,), {"scale": s}),
    ],
    ids=["tuple", "list", "dict", "ModelInputs"],
)
def test_inputs_of_several_kinds(mode: str, pack: Callable[[Tensor, Tensor], Any]) -> None:
    model = TwoInputs()
    raw = [(torch.randn(4, 5), torch.rand(4), torch.randint(3, (4,))) for _ in range(3)]
    rows = collect(model, [(pack(x, s), y) for x, s, y in raw], 3, mode=mode)["linear.weight"]
    x, s, y = raw[0] if mode == "batch" else (t[:1] for t in raw[0])
    expected = torch.autograd.grad(F.cross_entropy(model(x, s), y), model.linear.weight)[0]
    torch.testing.assert_close(rows[0], expected)


def test_targets_may_be_anything_the_loss_understands() -> None:
    data = [(torch.randn(4, 5), {"class": torch.randint(3, (4,)), "smoothing": 0.1}) for _ in range(2)]

    def loss(outputs: Tensor, targets: dict[str, Any]) -> Tensor:
        return F.cross_entropy(outputs, targets["class"], label_smoothing=targets["smoothing"])

    assert collect(nn.Linear(5, 3), data, 2, loss)["weight"].abs().sum() > 0


def test_a_list_is_as_good_as_a_tuple() -> None:
    data = vectors(2)
    assert torch.equal(
        *(collect(m, d, 2)["weight"] for m in [nn.Linear(5, 3)] for d in (data, [list(pair) for pair in data]))
    )


# No trace on the model


def marked() -> nn.Sequential:
    """A training model with a frozen statistic, a frozen weight, some gradients set and others None."""
    model = conv_net().train()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    return model


class Boom(Exception):
    pass


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_nothing_about_the_model_changes(mode: str) -> None:
    model = marked()
    before = snapshot(model)
    collect(model, images(3), 3, mode=mode)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("where", ["loss", "data", "consumer", "model"])
def test_nothing_changes_after_an_exception(mode: str, where: str) -> None:
    model = marked()
    before = snapshot(model)
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if where == "loss" and calls == 2:
            raise Boom
        return F.cross_entropy(outputs, targets)

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield from images(1)
        if where == "data":
            raise Boom
        if where == "model":
            yield torch.randn(4, 7, 6, 6), torch.zeros(4, dtype=torch.long)
        yield from images(9)

    def run() -> None:
        with eval_mode(model):
            slabs = gradient_slabs(model, stream(data()), loss, weights(model), 9, mode=mode, slab=2, progress=False)  # type: ignore[arg-type]
            for _ in slabs:
                if where == "consumer":
                    raise Boom

    with pytest.raises(ValueError if where in ("model", "loss") else Boom):
        run()
    assert same(before, snapshot(model))


def test_statistics_are_restored_even_if_the_loss_runs_the_model_in_training_mode() -> None:
    model = marked()
    before = snapshot(model)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        model.train()
        model(torch.randn(8, 3, 6, 6))
        return F.cross_entropy(outputs, targets)

    collect(model, images(2), 2, loss)
    assert same(before, snapshot(model))


class Stubborn(nn.Sequential):
    """Its ``train()`` freezes the first layer, as people do with BatchNorm."""

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        self[0].eval()
        return self


@pytest.mark.parametrize("inner", [True, False])
def test_modes_are_put_back_past_a_train_method_of_the_model_s_own(inner: bool) -> None:
    model = Stubborn(nn.Linear(5, 4), nn.Linear(4, 3)).train()
    model[0].train(inner)
    before = snapshot(model)
    collect(model, vectors(2), 2)
    assert same(before, snapshot(model))


def test_calibration_sees_eval_mode() -> None:
    model = marked()
    modes = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        modes.extend(m.training for m in model.modules())
        return F.cross_entropy(outputs, targets)

    collect(model, images(2), 2, loss)
    assert not any(modes)


# What cannot be


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_empty_loader(mode: str) -> None:
    with pytest.raises(ValueError, match="calibration data is empty"):
        collect(nn.Linear(5, 3), [], 4, mode=mode)


def test_an_iterator_that_ends_early_says_when_and_what_to_do() -> None:
    with pytest.raises(
        ValueError,
        match=r"ended after 5 batches and cannot be started again, but num_grads is 7: .*num_grads=5, or gradients='sample'",
    ):
        collect(nn.Linear(5, 3), iter(vectors(5)), 7, slab=3)
    with pytest.raises(
        ValueError, match=r"ended after 20 samples and cannot be started again, but num_grads is 21: .*num_grads=20$"
    ):
        collect(nn.Linear(5, 3), iter(vectors(5)), 21, mode="sample", slab=3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((1, 2, 3), r"batch 1 is a tuple of 3 \(int, int, int\), which is neither .* pass batch_fn"),
        (None, "batch 1 is None, which is neither .* pass batch_fn"),
        ("ab", "batch 1 is str, which is neither .* pass batch_fn"),
    ],
)
def test_items_that_are_no_pairs(item: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(nn.Linear(5, 3), [*vectors(1), item], 2)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_data_names_the_batch(mode: str, value: float) -> None:
    data = vectors(5)
    data[3][0][1, 2] = value
    with pytest.raises(ValueError, match=r"the loss of batch 3 is (nan|inf)"):
        collect(nn.Linear(5, 3), data, 20 if mode == "sample" else 5, mode=mode)


class Forgetful(torch.autograd.Function):
    """A finite value whose gradient is not, for inputs that are marked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, marked: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.where(ctx.saved_tensors[0] > 0, torch.nan, gradient), None


@pytest.mark.promise(
    "Numbers", "NaN or Inf in data, loss or gradients stops the run and names batch and layer; the model is unchanged"
)
@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("slab", [1, 3, 100])
def test_a_bad_gradient_names_the_very_batch_and_the_parameter(mode: str, slab: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    data = [(x, torch.zeros(4, 3)) for x, _ in vectors(6)]
    data[4][1][0] = 1

    def loss(outputs: Tensor, marked: Tensor) -> Tensor:
        return Forgetful.apply(outputs, marked).square().mean()

    with pytest.raises(ValueError, match=r"the gradient of 0\.weight holds NaN or Inf in batch 4\b"):
        collect(model, data, 24 if mode == "sample" else 6, loss, mode=mode, slab=slab)


def test_large_gradients_whose_sum_overflows_are_not_bad() -> None:
    model, data = nn.Linear(5, 3), [(torch.full((1, 5), 1e36), torch.zeros(1, dtype=torch.long)) for _ in range(200)]
    rows = collect(model, data, 200, lambda outputs, _: outputs.sum(), slab=200)["weight"]
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_parameter_without_part_in_the_loss(mode: str) -> None:
    model = nn.Linear(5, 3)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight takes no part in the loss.*leave it out of `params`"):
        collect(model, vectors(3), 3, mode=mode)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: o, r"loss_fn must return a scalar.*got shape \("),
        (lambda o, t: 0.5, "loss_fn must return a scalar.*got float"),
        (lambda o, t: o.sum() + 0j, r"loss_fn must return a scalar.*got complex64 \(\)"),
        (
            lambda o, t: o.detach().sum(),
            "the loss of batch 0 does not depend on any parameter, .*: loss_fn detaches it",
        ),
    ],
)
def test_a_loss_that_is_no_mean(mode: str, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(nn.Linear(5, 3), vectors(2, size=3), 2, loss, mode=mode)


def test_unreduced_losses() -> None:
    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    model, data = nn.Linear(5, 3), vectors(2, size=3)
    with pytest.raises(
        ValueError, match=r"loss_fn must return a scalar tensor, the mean over the batch, got shape \(3,\)"
    ):
        collect(model, data, 2, per_sample)
    assert torch.equal(
        collect(model, data, 6, per_sample, mode="sample")["weight"], collect(model, data, 6, mode="sample")["weight"]
    )


def test_inputs_without_a_tensor() -> None:
    with pytest.raises(ValueError, match="inputs of batch 0 hold no tensor"):
        collect(nn.Linear(5, 3), [("picture.png", torch.zeros(1))], 1, mode="sample")

"""Batches as loaders give them, loaders that are too short, and errors that name the batch."""

from __future__ import annotations

import logging
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from memory_case import TWO_GROUPS
from memory_case import net as three_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import capruner
from capruner.batches import BatchError, Batches, as_batch, default_loss
from capruner.calibration.stream import CalibrationStream

MODES = ["batch", "sample"]


def pairs(count: int = 8, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


class Outputs(OrderedDict):
    """As Hugging Face's models give them: entries are attributes too."""

    __getattr__ = OrderedDict.__getitem__


class Classifier(nn.Module):
    """Takes keywords; computes its loss where it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.linear(x if mask is None else x * mask)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return Outputs(**loss, logits=logits)


def prune(model: nn.Module, batches: Any, *loss: Any, **more: Any) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {"sparsity": 0.5, "num_grads": 8, "progress": False} | more
    weights = capruner.prune(model, batches, *loss, **arguments).level().weights
    return {name.removeprefix("linear."): weight for name, weight in weights.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-6) for n in a)


# Kinds of batches

MAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {"dict": dict, "UserDict": UserDict, "OrderedDict": OrderedDict}


@pytest.mark.promise(
    "Data", "Batches may be pairs, mappings, tensors, or anything else with `batch_fn`; others are refused by name"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MAPPINGS)
def test_a_mapping_is_keywords_and_the_model_s_own_loss(kind: str, mode: str) -> None:
    expected = prune(linear(), pairs(), gradients=mode)
    batches = [MAPPINGS[kind]({"x": x, "labels": y, "mask": torch.ones(len(x), 5)}) for x, y in pairs()]
    assert same(prune(Classifier(), batches, gradients=mode), expected)
    assert same(prune(Classifier(), batches, lambda outputs, batch: outputs.loss, gradients=mode), expected)
    given = prune(Classifier(), batches, lambda o, batch: F.cross_entropy(o.logits, batch["labels"]), gradients=mode)
    assert same(given, expected)
    without = [MAPPINGS[kind]({"x": x}) for x, _ in pairs()]
    with pytest.raises(
        ValueError, match=r"the batch is a mapping and the model's output has no `loss`: put the labels"
    ):
        prune(Classifier(), without, gradients=mode)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_a_mapping_and_targets(mode: str) -> None:
    batches = [(UserDict({"x": x}), y) for x, y in pairs()]
    assert same(prune(Classifier(), batches, gradients=mode), prune(linear(), pairs(), gradients=mode))


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_hugging_face(mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    images = [(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0, 2])) for _ in range(8)]
    params = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    arguments: dict[str, Any] = {"params": params, "gradients": mode, "fisher_block_size": 16}
    features = [transformers.BatchFeature({"pixel_values": x, "labels": y}) for x, y in images]
    expected = prune(model, images, **arguments)
    assert same(prune(model, features, **arguments), expected)
    assert same(prune(model, [transformers.BatchEncoding(dict(f)) for f in features], **arguments), expected)
    drawn = prune(model, features, labels="model", **arguments)
    assert same(prune(model, [x for x, _ in images], labels="model", **arguments), drawn)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pack", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: (x, None), lambda x: {"x": x}])
def test_batches_without_targets(pack: Callable[[Tensor], Any], mode: str) -> None:
    model, batches = Classifier(), [pack(x) for x, _ in pairs()]
    expected = prune(model, pairs(), labels="model", gradients=mode)
    assert same(prune(model, batches, labels="model", gradients=mode), expected)
    plain = prune(model, batches, lambda outputs, _: outputs.logits.square().mean(), gradients=mode)
    assert same(plain, prune(model, pairs(), lambda outputs, _: outputs["logits"].square().mean(), gradients=mode))
    with pytest.raises(ValueError, match=r"batch.* has no (targets|`loss`)"):
        prune(model, batches, gradients=mode)


def test_a_loss_that_fails_without_targets_says_so() -> None:
    with pytest.raises(ValueError, match=r"the loss fails on batch 0 .*the batch has no targets: pass labels='model'"):
        prune(linear(), [x for x, _ in pairs()], F.cross_entropy)


class Sample(NamedTuple):
    x: Tensor
    y: Tensor
    w: Tensor


@pytest.mark.promise(
    "Data", "Batches may be pairs, mappings, tensors, or anything else with `batch_fn`; others are refused by name"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind", [lambda *parts: parts, lambda *parts: [*parts], Sample, lambda *p: SimpleNamespace(p=p)]
)
def test_batch_fn_makes_pairs_of_anything_else(kind: Callable[..., Any], mode: str) -> None:
    batches = [kind(x, y, torch.ones(len(x))) for x, y in pairs()]
    with pytest.raises(ValueError, match=r"batch 0 is .*neither \(inputs, targets\) nor .*: pass batch_fn"):
        prune(linear(), batches, gradients=mode)

    def batch_fn(batch: Any) -> tuple[Any, Any]:
        x, y, w = batch.p if isinstance(batch, SimpleNamespace) else batch
        return x, (y, w)

    def loss(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return (F.cross_entropy(outputs, targets[0], reduction="none") * targets[1]).mean()

    found = prune(linear(), batches, loss, batch_fn=batch_fn, gradients=mode)
    assert same(found, prune(linear(), pairs(), gradients=mode))
    masks = {"weight": torch.arange(15).view(3, 5) % 2}
    for one, other in [(batches, pairs())]:
        a = capruner.compensate_masks(linear(), one, loss, masks, num_grads=8, batch_fn=batch_fn, progress=False)
        b = capruner.compensate_masks(linear(), other, F.cross_entropy, masks, num_grads=8, progress=False)
        assert same(dict(a.level().weights), dict(b.level().weights))


def test_a_batch_fn_that_fails_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"batch_fn must return \(inputs, targets\); it returned float32 \(4, 5\) for batch 0"
    ):
        prune(linear(), pairs(), batch_fn=lambda batch: batch[0])
    with pytest.raises(ValueError, match=r"batch_fn fails on batch 0, a tuple of 2 .*: KeyError: 'x'"):
        prune(linear(), pairs(), batch_fn=lambda batch: {}["x"])
    with pytest.raises(ValueError, match=r"batch_fn must be a function .*, got 'x'"):
        prune(linear(), pairs(), batch_fn="x")


@pytest.mark.parametrize("pack", [lambda x, y: (x,), lambda x, y: {"x": x}, lambda x, y: (x, y), lambda x, y: x])
def test_recalibrate_bn_takes_what_prune_takes(pack: Callable[[Tensor, Tensor], Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.add_(1))

    plain, other, data = Net(), Net(), pairs()
    before = [x.clone() for x, _ in data]
    assert capruner.recalibrate_bn(plain, data) == capruner.recalibrate_bn(other, [pack(*batch) for batch in data]) == 1
    assert torch.equal(plain.bn.running_mean, other.bn.running_mean)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before))
    assert capruner.recalibrate_bn(other, [(1, *batch) for batch in data], batch_fn=lambda b: (b[1], b[2])) == 1
    assert torch.equal(plain.bn.running_mean, other.bn.running_mean)


def test_scalars_and_words_in_a_batch_are_the_same_for_all_samples() -> None:
    batches = [({"x": x, "scale": torch.tensor(2.0), "name": "train"}, y) for x, y in pairs()]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor, scale: Tensor, name: str) -> Tensor:
            return self.linear(x) * scale

    expected = prune(linear(), [(2 * x, y) for x, y in pairs()], gradients="sample", params=["weight"])
    model = Scaled()
    with torch.no_grad():
        model.linear.bias.zero_()
    found = prune(model, batches, gradients="sample")
    assert found["weight"].shape == expected["weight"].shape


def test_kinds_directly() -> None:
    x, y = pairs(1)[0]
    inputs, targets = as_batch({"x": x, "inner": UserDict({"y": y})}, 0)
    assert inputs is targets
    assert type(inputs["inner"]) is dict
    assert default_loss({"loss": torch.tensor(3.0)}, None) == 3
    with pytest.raises(
        BatchError, match=r"the model's output is a tuple of 2 \(float32 \(4, 5\), int64 \(4,\)\), and the default"
    ):
        default_loss((x, y), y)


# Loaders that are too short


@pytest.mark.parametrize("mode", MODES)
def test_a_short_loader_is_started_again_and_says_so_once(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    count = 8 if mode == "batch" else 32
    data = pairs()
    with caplog.at_level(logging.WARNING, "capruner"):
        found = prune(linear(), data[:3], gradients=mode, num_grads=count, num_recomputations=2)
    assert same(found, prune(linear(), (data[:3] * 3)[:8], gradients=mode, num_grads=count, num_recomputations=2))
    assert [r.message for r in caplog.records] == [
        "the calibration data ends after 3 batches, fewer than num_grads needs, and is started again: gradients repeat, unless the loader shuffles or augments"
    ]


def test_a_short_loader_and_a_memory_budget() -> None:
    data = [(torch.randn(4, 40), torch.randint(5, (4,))) for _ in range(5)]
    torch.manual_seed(0)
    model = three_layers()
    whole, parts = (
        prune(model, data, num_grads=12, fisher_block_size=60, memory_budget=budget) for budget in (None, TWO_GROUPS)
    )
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.promise(
    "Data", "A loader that ends before `num_grads` is started again, with a warning before the first batch"
)
def test_its_length_is_looked_at_first(caplog: pytest.LogCaptureFixture) -> None:
    def batch_fn(batch: Any) -> Any:
        assert "ends after 3 batches" in caplog.text
        return batch

    loader = DataLoader(TensorDataset(torch.randn(12, 5), torch.zeros(12, dtype=torch.long)), batch_size=4)
    with caplog.at_level(logging.WARNING, "capruner"):
        prune(linear(), loader, batch_fn=batch_fn)
    drawn = 0

    class Sized:
        def __iter__(self) -> Iterator[Any]:
            return self

        def __len__(self) -> int:
            return 3

        def __next__(self) -> Any:
            nonlocal drawn
            drawn += 1
            return pairs(1)[0]

    with pytest.raises(ValueError, match="is an iterator of 3 batches, and num_grads is 8: pass a DataLoader"):
        prune(linear(), Sized())
    assert not drawn


def test_a_loader_without_a_length(caplog: pytest.LogCaptureFixture) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([(x[0], y[0]) for x, y in pairs()])

    with caplog.at_level(logging.WARNING, "capruner"):
        found = prune(linear(), DataLoader(Stream(), batch_size=2))
    data = [
        (torch.stack([a[0][0], b[0][0]]), torch.stack([a[1][0], b[1][0]])) for a, b in zip(pairs()[::2], pairs()[1::2])
    ]
    assert same(found, prune(linear(), data * 2))
    assert "ends after 4 batches" in caplog.text


@pytest.mark.promise("Data", "An iterator that ends before `num_grads` is an error")
def test_what_cannot_be_started_again_says_how_many_there_were() -> None:
    class Once:
        def __init__(self) -> None:
            self.stream = iter(pairs(3))

        def __iter__(self) -> Iterator[Any]:
            return self.stream

    for batches in (iter(pairs(3)), (batch for batch in pairs(3)), Once()):
        with pytest.raises(
            ValueError,
            match=r"ended after 3 batches and cannot be started again, but num_grads is 8: pass a DataLoader",
        ):
            prune(linear(), batches)
    with pytest.raises(ValueError, match="ended after 12 samples and cannot be started again"):
        prune(linear(), iter(pairs(3)), gradients="sample", num_grads=13)


def test_batches_without_samples() -> None:
    empty = (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch 0 is empty: its inputs are float32 \(0, 5\)"):
        prune(linear(), [empty], gradients="sample")
    with pytest.raises(ValueError, match="too many to skip"):
        prune(linear(), [empty], gradients="sample", on_bad_batch="skip")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_killed_run_resumes_in_a_later_pass(
    mode: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capruner.checkpoint.run.SAVE_EVERY", 0.0)

    class Shuffled:
        """Another order in each pass, as of a loader that shuffles."""

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Any]:
            for i in torch.randperm(3, generator=self.generator):
                yield pairs()[i]

    class Killed(Exception):
        pass

    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    def run(**more: Any) -> dict[str, Tensor]:
        return prune(
            linear(), Shuffled(), loss, gradients=mode, labels=labels, num_grads=40, num_recomputations=2, **more
        )

    stop = 10**9
    whole = run()
    if mode == "batch" and labels == "model":  # the draws go on from pass to pass
        assert not torch.equal(torch.stack(seen[:3]).sort(0).values, torch.stack(seen[3:6]).sort(0).values)
    for stop in (len(seen) * 3 // 8, len(seen) * 7 // 8):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            run(state_dir=tmp_path / str(stop))
        seen.clear()
        at, stop = stop, 10**9
        found = run(state_dir=tmp_path / str(at))
        assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_changed_data_inside_a_mapping_is_noticed(labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capruner.checkpoint.run.SAVE_EVERY", 0.0)
    seen: list[Any] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        seen.append(targets)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return (outputs if isinstance(outputs, Tensor) else outputs.logits).square().mean()

    def run(shift: float) -> None:
        batches = [UserDict({"x": x + shift}) for x, _ in pairs()]
        prune(Classifier(), batches, loss, num_grads=32, labels=labels, state_dir=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(0.0)
    with pytest.raises(capruner.StateError, match=r"batch \d+ of the calibration data differs"):
        run(1.0)
    run(0.0)


def test_streams() -> None:
    assert [batch for batch, _ in zip(Batches([0, 1, 2]), range(5))] == [0, 1, 2, 0, 1]
    assert list(Batches(iter([0, 1, 2]))) == [0, 1, 2]


def stream(source: Any, drawn: int = 0) -> CalibrationStream:
    found = CalibrationStream(Batches(source), torch.device("cpu"))
    found.drawn = drawn
    return found


def test_a_stream_resumes_after_what_was_drawn() -> None:
    batches = pairs(3)
    assert [index for (index, _, _), _ in zip(stream(batches, 2), range(3))] == [2, 3, 4]
    unfinished = stream(batches, 2)
    unfinished.used = 1
    assert next(unfinished)[0] == 1
    for resume in (lambda s: next(s), lambda s: s.skip()):
        with pytest.raises(ValueError, match="ended after 3 batches, but 4 were drawn before"):
            resume(stream(iter(batches), 4))
    source = iter(batches)
    stream(source, 2).skip()
    assert len(list(source)) == 1


def test_a_stream_that_is_restored_continues() -> None:
    one = stream(iter(pairs(5)))
    next(one), next(one)
    one.skipped.append(1)
    one.digests = ["a", "b"]
    other = stream(pairs(5))
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert next(other)[0] == 2


# Models that change their inputs


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(0.5).add_(1))


@pytest.mark.promise("Data", "A model that changes its inputs in place changes copies only")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pack", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}])
def test_inputs_are_copies(mode: str, pack: Callable[[Tensor, Tensor], Any]) -> None:
    data = pairs()
    batches = [pack(x, y) for x, y in data]
    kept = [x.clone() for x, _ in data]

    class Model(InPlace):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets["y"] if isinstance(targets, dict) else targets)

    found = prune(Model(), batches, loss, gradients=mode, num_grads=16, num_recomputations=2)
    assert all(torch.equal(x, before) for (x, _), before in zip(data, kept))
    changed = [(x * 0.5 + 1, y) for x, y in data]
    assert same(found, prune(linear(), changed, gradients=mode, num_grads=16, num_recomputations=2))


def test_data_made_in_inference_mode_and_a_caller_in_inference_mode() -> None:
    model = linear()
    with torch.inference_mode():
        data = pairs()
    for mode in MODES:
        expected = prune(model, pairs(), gradients=mode)
        assert same(prune(model, data, gradients=mode), expected)
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                inside = capruner.prune(model, pairs(), gradients=mode, num_grads=8, progress=False)
            assert same(dict(inside.level().weights), expected)
            inside.apply(linear())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"weight was made in torch.inference_mode\(\)"):
        prune(linear(), data)


# Errors of the model and the loss


class Strange(Exception):
    pass


@pytest.mark.promise("Data", "An error of the model or the loss is reported with the batch and its shapes")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [AssertionError, KeyError, ValueError, AttributeError, Strange, ZeroDivisionError])
def test_any_error_of_the_model_or_the_loss_names_the_batch(error: type[Exception], mode: str) -> None:
    class Model(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Model.calls += 1
            if Model.calls == 3:
                raise error("image size")
            return super().forward(x)

    number = 2 if mode == "batch" else 1
    with pytest.raises(
        ValueError,
        match=rf"the model fails on batch {number} \(inputs: float32 \(\d, 5\)\): {error.__name__}: .?image size",
    ) as found:
        prune(Model(nn.Linear(5, 3)), pairs(), gradients=mode, num_grads=8)
    assert isinstance(found.value.__cause__, error)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise error

    with pytest.raises(
        ValueError,
        match=rf"the loss fails on batch 0 \(outputs: float32 \(\d, 3\); targets: int64 \(\d,\)\): {error.__name__}",
    ):
        prune(linear(), pairs(), loss, gradients=mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_interrupts_pass(error: type[BaseException]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise error

    with pytest.raises(error):
        prune(linear(), pairs(), loss)


def test_outputs_that_are_tuples() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    message = r"a tuple of 2 \(float32 \(4, 3\), float32 \(4, 5\)\).*pass a loss_fn that takes"
    for loss in ((), (F.cross_entropy,)):
        with pytest.raises(ValueError, match=message):
            prune(Aux(), pairs(), *loss)

    class Segmenter(Aux):
        def forward(self, x: Tensor) -> Any:
            return {"out": self.linear(x)}

    with pytest.raises(ValueError, match=r"a dict of 1 \(out: float32 .*cross_entropy\(outputs\['out'\], targets\)"):
        prune(Segmenter(), pairs())
    taken = prune(Aux(), pairs(), lambda outputs, y: F.cross_entropy(outputs[0], y))
    assert same(taken, prune(linear(), pairs()))


def test_an_operation_that_vmap_does_not_support() -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > -1e9 else -x)

    with pytest.raises(ValueError, match=r"the model fails on batch 0 .*gradients='sample' needs torch.func.vmap"):
        prune(Branching(5, 3), pairs(), gradients="sample")


# Parameters and losses without gradients


@pytest.mark.parametrize("mode", MODES)
def test_all_parameters_without_part_in_the_loss_are_named_at_once(mode: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.one, self.two = linear(), linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x)

    with pytest.raises(
        ValueError, match=r"one\.weight, two\.weight take no part in the loss .*leave them out of `params`"
    ):
        prune(Heads(), pairs(), gradients=mode)


class Wrapped(nn.Module):
    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.linear, self.context = linear(), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.linear(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients(context: Callable[[], Any], mode: str) -> None:
    message = r"the model's outputs are detached .*torch.no_grad\(\) or torch.inference_mode\(\)"
    with pytest.raises(ValueError, match=message):
        prune(Wrapped(context), pairs(), gradients=mode)

    class Keywords(Wrapped):
        def forward(self, x: Tensor) -> Any:
            return Outputs(logits=super().forward(x))

    with pytest.raises(ValueError, match=message):
        prune(Keywords(context), pairs(), gradients=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_detached_loss(mode: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.detach(), targets)

    with pytest.raises(ValueError, match=r"the loss of batch 0 does not depend on any parameter.*loss_fn detaches it"):
        prune(linear(), pairs(), loss, gradients=mode)


# Sparse gradients


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.bags = nn.Embedding(7, 5, sparse=sparse), nn.EmbeddingBag(7, 5, sparse=sparse, mode="sum")
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.words(x).mean(1) + self.bags(x))


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randint(7, (4, 2), generator=generator), y) for _, y in pairs()]
    arguments: dict[str, Any] = {"params": ["words.weight", "linear.weight"], "gradients": mode}
    if mode == "batch":
        arguments["params"] = [*arguments["params"], "bags.weight"]
    assert same(prune(Words(True), batches, **arguments), prune(Words(False), batches, **arguments))

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from untouched import same, snapshot

import capruner
from capruner.result import Level, PruningResult, _checksum


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def images(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(4, 3, 6, 6).to(dtype), torch.randint(3, (4,))) for _ in range(12)]


def pruned(dtype: torch.dtype = torch.float32, sparsity: Any = (0.3, 0.5, 0.9), **more: Any) -> PruningResult:
    settings = {"num_grads": 12, "fisher_block_size": 25, "damp": 1e-3, "progress": False} | more
    return capruner.prune(net(dtype), images(dtype), sparsity=sparsity, **settings)


def test_apply_writes_weights_and_zeros_and_nothing_else() -> None:
    result, model = pruned(), net()
    untouched = {n: t.clone() for n, t in model.state_dict().items()}
    result.apply(model, 0.5)
    for name, tensor in model.state_dict().items():
        if name in result.masks(0.5):
            assert torch.equal(tensor, result.level(0.5).weights[name])
            assert torch.equal(tensor != 0, result.masks(0.5)[name])
        else:
            assert torch.equal(tensor, untouched[name])


def test_any_order_of_sparsities_ends_the_same() -> None:
    result, there, back = pruned(), net(), net()
    result.apply(there, 0.5)
    for s in (0.9, 0.3, 0.5):
        result.apply(back, s)
    assert same(snapshot(there)[3], snapshot(back)[3])


def test_apply_keeps_parameters_and_their_gradients() -> None:
    result, model = pruned(), net().train()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = snapshot(model)
    result.apply(model, 0.5)
    after = snapshot(model)
    assert [same(b, a) for b, a in zip(before, after)] == [True, True, True, False, True, True, True]


def test_apply_looks_through_a_data_parallel_wrapper() -> None:
    result, model = pruned(), net()
    result.apply(nn.DataParallel(model), 0.9)
    assert torch.equal(model[4].weight != 0, result.masks(0.9)["4.weight"])


@pytest.mark.promise("Models and masks", "`apply` to a model that does not fit changes nothing")
def test_apply_to_a_model_that_does_not_fit_touches_nothing() -> None:
    result = pruned()
    wider = net()
    wider[4] = nn.Linear(64, 5)
    shorter = net()[:4]
    for model, message in (
        (wider, r"4\.weight has shape \(5, 64\) in the model, \(3, 64\) in the result"),
        (shorter, r"no parameter 4\.weight: this result belongs to another"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            result.apply(model, 0.5)
        assert same(before, snapshot(model))


@pytest.mark.parametrize("method", ["apply", "masks", "predicted_loss", "layer_report", "model_sparsity", "level"])
@pytest.mark.parametrize("asked", [0.75, 0.0, 50])
def test_a_sparsity_that_is_not_in_reach(method: str, asked: float) -> None:
    result, model = pruned(), net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"sparsity {asked} is not in reach: this result holds \[0\.3, 0\.5, 0\.9\]"):
        getattr(result, method)(*[model] * (method == "apply"), asked)
    assert same(before, snapshot(model))


def test_the_only_level_needs_no_name() -> None:
    result = pruned(sparsity=0.4)
    assert result.level() is result.level(0.4)
    assert result.sparsities == [0.4]


def test_sparsities_are_sorted_and_found_despite_rounding() -> None:
    result = pruned(sparsity=[0.9, 0.1 + 0.2, 0.5])
    assert result.sparsities == sorted(result.sparsities)
    assert result.level(0.3) is result.levels[0]


@pytest.mark.parametrize("s", [0.3, 0.5, 0.9])
def test_report_adds_up(s: float) -> None:
    result, model = pruned(), net()
    rows = result.layer_report(s)
    assert [list(row) for row in rows] == [["name", "shape", "numel", "zeros", "sparsity", "predicted_loss"]] * 2
    assert [row["name"] for row in rows] == ["0.weight", "4.weight"]
    assert [row["shape"] for row in rows] == [(4, 3, 3, 3), (3, 64)]
    result.apply(model, s)
    for row in rows:
        weight = dict(model.named_parameters())[row["name"]]
        assert row["zeros"] == int((weight == 0).sum())
        assert row["numel"] == weight.numel()
        assert row["sparsity"] == row["zeros"] / row["numel"]
    zeros = sum(row["zeros"] for row in rows)
    assert zeros == round(s * 300)
    assert sum(row["predicted_loss"] for row in rows) == pytest.approx(result.predicted_loss(s))
    total = sum(p.numel() for p in model.parameters())
    assert total > 300
    assert result.model_sparsity(s) == (zeros / 300, zeros / total)


def test_predicted_loss_rises_with_sparsity() -> None:
    result = pruned()
    losses = [result.predicted_loss(s) for s in result.sparsities]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_magnitude_predicts_no_loss() -> None:
    assert pruned(method="magnitude").predicted_loss(0.9) == 0


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["cap", "fast_cap", "obs", "magnitude"])
def test_saved_and_loaded_bit_by_bit(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    result = pruned(dtype, method=method)
    result.save(tmp_path / "r.safetensors")
    again = capruner.load_result(str(tmp_path / "r.safetensors"))
    assert again.method == result.method
    assert again.sparsities == result.sparsities
    assert again.total_weights == result.total_weights
    assert again.settings == result.settings
    assert again.timings == result.timings
    for s in result.sparsities:
        a, b = result.level(s), again.level(s)
        assert list(a.weights) == list(b.weights) == list(b.masks)
        assert dict(a.losses) == dict(b.losses)
        for name in a.weights:
            assert b.weights[name].dtype == dtype
            assert b.masks[name].dtype == torch.bool
            assert torch.equal(a.weights[name], b.weights[name])
            assert torch.equal(a.masks[name], b.masks[name])
    model = net(dtype)
    again.apply(model, 0.5)
    assert torch.equal(model[4].weight, result.level(0.5).weights["4.weight"])


def test_masks_take_a_bit_per_weight(tmp_path: Path) -> None:
    result = pruned(sparsity=[0.5])
    result.save(tmp_path / "r")
    header = int.from_bytes((tmp_path / "r").read_bytes()[:8], "little")
    body = (tmp_path / "r").stat().st_size - 8 - header
    assert body == 4 * 300 + 14 + 24  # 108 and 192 weights


def test_settings_that_json_does_not_know_do_not_lose_the_result(tmp_path: Path) -> None:
    pruned(fisher_inv_device=torch.device("cpu")).save(tmp_path / "r")
    settings = capruner.load_result(tmp_path / "r").settings
    assert (settings["fisher_inv_device"], settings["pattern"]) == ("cpu", "unstructured")


def test_saving_replaces_and_leaves_no_pieces(tmp_path: Path) -> None:
    pruned().save(tmp_path / "r")
    pruned(sparsity=0.7).save(tmp_path / "r")
    assert capruner.load_result(tmp_path / "r").sparsities == [0.7]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pruned().save(tmp_path / "nowhere" / "r")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            capruner.load_result(path)


def write(path: Path, header: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"x": torch.zeros(1)}, path, metadata={"capruner": text})
    return path


GOOD: dict[str, Any] = {
    "format": "capruner-result",
    "version": 1,
    "method": "cap",
    "total_weights": 4,
    "settings": {},
    "timings": {},
    "levels": [{"sparsity": 0.5, "losses": {"w": 0.0}}],
}
TENSORS = {"0/weight/w": torch.tensor([1.0, 0.0, 2.0, 0.0]), "0/mask/w": torch.tensor([0b10100000], dtype=torch.uint8)}


def test_the_format_is_as_written_here(tmp_path: Path) -> None:
    level = capruner.load_result(write(tmp_path / "r", GOOD, TENSORS)).level(0.5)
    assert level.weights["w"].tolist() == [1, 0, 2, 0]
    assert level.masks["w"].tolist() == [True, False, True, False]
    assert level.others == {}  # version 1
    levels = [GOOD["levels"][0] | {"others": ["b"]}]
    header, tensors = GOOD | {"version": 2, "levels": levels}, TENSORS | {"0/other/b": torch.tensor([3.0])}
    path = write(tmp_path / "r", header | {"sha256": _checksum(header, sorted(tensors.items()))}, tensors)
    assert capruner.load_result(path).level().others["b"].tolist() == [3]


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({}, TENSORS),
        ([], TENSORS),
        ("not json", TENSORS),
        (GOOD | {"format": "other"}, TENSORS),
        (GOOD | {"version": "new"}, TENSORS),
        (GOOD | {"version": 3}, TENSORS),
        (GOOD | {"levels": [GOOD["levels"][0] | {"others": ["b"]}]}, TENSORS),
        (
            GOOD | {"levels": [GOOD["levels"][0] | {"others": ["b"]}]},
            TENSORS | {"0/other/b": torch.tensor([torch.nan])},
        ),
        (GOOD | {"levels": [GOOD["levels"][0] | {"others": 3}]}, TENSORS),
        ({k: v for k, v in GOOD.items() if k != "version"}, TENSORS),
        ({k: v for k, v in GOOD.items() if k != "method"}, TENSORS),
        ({k: v for k, v in GOOD.items() if k != "levels"}, TENSORS),
        (GOOD | {"levels": [{"sparsity": 0.5}]}, TENSORS),
        (GOOD | {"levels": {"sparsity": 0.5}}, TENSORS),
        (GOOD, {"0/weight/w": TENSORS["0/weight/w"]}),
        (GOOD, {"0/mask/w": TENSORS["0/mask/w"]}),
        (GOOD, TENSORS | {"0/mask/w": torch.tensor([1.0])}),
        (GOOD, TENSORS | {"0/mask/w": torch.zeros(0, dtype=torch.uint8)}),
        (GOOD, TENSORS | {"0/mask/w": torch.tensor([0b01000000], dtype=torch.uint8)}),
    ],
)
def test_foreign_newer_and_damaged_files_are_named(header: Any, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "strange", header, tensors)
    with pytest.raises(ValueError, match="strange"):
        capruner.load_result(path)


def test_a_newer_version_is_called_newer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"newer capruner \(format 3, this one reads 2\)"):
        capruner.load_result(write(tmp_path / "r", GOOD | {"version": 3}, TENSORS))


def test_a_safetensors_file_of_somebody_else(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a safetensors file, but not a pruning result"):
        capruner.load_result(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x80\x04\x95pickle", b"PK\x03\x04" + bytes(100)])
def test_files_that_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "strange").write_bytes(content)
    with pytest.raises(ValueError, match="strange"):
        capruner.load_result(tmp_path / "strange")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_torn_files(share: float, tmp_path: Path) -> None:
    pruned().save(tmp_path / "torn")
    whole = (tmp_path / "torn").read_bytes()
    (tmp_path / "torn").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="torn is damaged or not a pruning result"):
        capruner.load_result(tmp_path / "torn")


def test_levels_made_by_hand() -> None:
    weights = {"weight": torch.tensor([[1.0, 0.0]])}
    level = Level(0.5, weights, {"weight": weights["weight"] != 0}, {"weight": 0.25})
    result, model = PruningResult("mine", [level], 3), nn.Linear(2, 1)
    result.apply(model)
    assert model.weight.tolist() == [[1, 0]]
    assert result.model_sparsity() == (0.5, 1 / 3)


def test_a_result_shows_what_it_is_and_asks_which_sparsity() -> None:
    model = nn.Linear(8, 4)
    result = capruner.prune(model, None, sparsity=[0.25, 0.5], method="magnitude")
    text = "PruningResult(method='magnitude', sparsities=[0.25, 0.5], layers=1, prunable_weights=32, total_weights=36)"
    assert repr(result) == text
    with pytest.raises(ValueError, match=r"holds several sparsities, \[0.25, 0.5\]: say which one"):
        result.apply(model)

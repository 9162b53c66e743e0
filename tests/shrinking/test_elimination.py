"""Elimination of units against the definition: the quadratic problem with all weights of the reading layers at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from capruner.shrinking.budget import Costs, allocate_units
from capruner.shrinking.elimination import Reader, ReaderFisher, eliminate_units
from capruner.shrinking.units import Cut, Group, columns


def positive(size: int) -> Tensor:
    root = torch.randn(size, 2 * size, dtype=torch.float64)
    return root @ root.T / size


def reader(layer: nn.Module) -> tuple[Reader, Tensor]:
    """A reader with random Fisher matrices, and the whole of its Fisher matrix, rows first."""
    weight = ReaderFisher(layer, 1, 0.1).matrix().double()
    A, G = positive(weight.shape[1]), positive(weight.shape[0])
    root = torch.linalg.cholesky(G).T
    return Reader(layer, weight, torch.linalg.inv(A), root), torch.kron(G, A)


def removal(weight: Tensor, fisher: Tensor, gone: Tensor) -> tuple[float, Tensor]:
    """The least increase of ``½ δᵀ F δ`` with the columns ``gone`` at zero, and the weights there."""
    zero = torch.zeros_like(weight, dtype=torch.bool)
    zero[:, gone] = True
    zero = zero.flatten()
    inverse = torch.linalg.inv(fisher)
    delta = -inverse[:, zero] @ torch.linalg.solve(inverse[zero][:, zero], weight.flatten()[zero])
    return float(delta @ fisher @ delta) / 2, (weight.flatten() + delta).view_as(weight)


@pytest.mark.parametrize("width", [1, 2])
def test_greedy_elimination_is_that_of_the_whole_problem(width: int) -> None:
    layers = {"a": nn.Linear(6, 4), "b": nn.Conv2d(3 if width == 2 else 6, 2, (1, 3), bias=False)}
    made = {name: reader(layer) for name, layer in layers.items()}
    units = 6 // width
    a = torch.randperm(6).view(units, width)
    b = torch.randperm(units)[:, None]
    group = Group("g", "channels", (Cut("a", "in", a), Cut("b", "in", b)))
    order, losses = eliminate_units(group, {name: r for name, (r, _) in made.items()})
    at = {"a": columns(layers["a"], a), "b": columns(layers["b"], b)}
    assert sorted(order.tolist()) == list(range(units))

    def cost(some: list[int]) -> float:
        return sum(removal(r.weight, F, at[name][some].flatten())[0] for name, (r, F) in made.items())

    for step in range(units):
        before = order[:step].tolist()
        others = [unit for unit in range(units) if unit not in before]
        costs = {unit: cost([*before, unit]) for unit in others}
        assert min(costs, key=costs.__getitem__) == order[step]
        assert float(losses[: step + 1].sum()) == pytest.approx(costs[int(order[step])], rel=1e-8)


def test_refit_is_the_minimum() -> None:
    layer = nn.Linear(5, 3)
    made, fisher = reader(layer)
    gone = torch.tensor([1, 4])
    expected = removal(made.weight, fisher, gone)[1]
    found = made.refit(gone)
    assert torch.allclose(found, expected, atol=1e-10)
    assert not found[:, gone].any()
    made.write_to(layer, [1, 4])
    assert torch.allclose(layer.weight.double(), expected, atol=1e-6)


def test_fisher_matrices_from_gradients() -> None:
    layer = nn.Conv2d(2, 3, 2)
    gradients = torch.randn(7, 3, 2, 2, 2)
    fisher = ReaderFisher(layer, 7, damp=0.1)
    fisher.add(gradients[:4])
    fisher.add(gradients[4:])
    rows = gradients.flatten(2).double()
    A = torch.einsum("krc,krd->cd", rows, rows) / 21
    G = torch.einsum("krc,kqc->rq", rows, rows)
    G *= 3 / G.trace()
    A += 0.1 * A.diagonal().mean() * torch.eye(8)
    made = fisher.solve()
    assert torch.allclose(made.root.T @ made.root, G, atol=1e-6)
    assert torch.allclose(made.H, torch.linalg.inv(A), rtol=1e-4, atol=1e-5)


def test_a_layer_without_gradient_loses_its_units_first() -> None:
    layer = nn.Linear(3, 2)
    fisher = ReaderFisher(layer, 1, 0.1)
    fisher.add(torch.zeros(1, 2, 3))
    assert not fisher.heard
    silent = eliminate_units(Group("g", "neurons", (Cut("a", "in", torch.arange(3)[:, None]),)), {"a": fisher.solve()})
    assert float(silent[1].max()) < 1e-200


class Chain(nn.Module):
    """Three layers; the second one reads the first and is read by the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)


def chain() -> tuple[list[Group], Costs]:
    each = torch.arange(4)[:, None]
    groups = [
        Group("a", "neurons", (Cut("a", "out", each), Cut("b", "in", each))),
        Group("b", "neurons", (Cut("b", "out", each), Cut("c", "in", each))),
    ]
    return groups, Costs(8 + 16 + 8 + 2, {"a": 8, "b": 16, "c": 8}, {})


def test_allocation_meets_the_target_where_groups_share_a_layer() -> None:
    groups, costs = chain()
    losses = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([9.0, 9, 9, 9])}
    counts = allocate_units(Chain(), groups, losses, costs, 0.6)
    # 34 multiply-adds; two of a's units away leave 4 + 8 + 8 + 2 = 22 of them, 65 %; three leave 16.
    assert counts == {"a": 3, "b": 0}
    assert allocate_units(Chain(), groups, losses, costs, 22 / 34) == {"a": 2, "b": 0}
    with pytest.raises(ValueError, match=r"out of reach: 20\.6% remains of the smallest network, with 2 groups"):
        allocate_units(Chain(), groups, losses, costs, 0.2)


def test_multiples_of_channels_remain() -> None:
    groups, costs = chain()
    assert (
        allocate_units(Chain(), groups, {n: torch.ones(4) for n in "ab"}, costs, 0.9, multiple_of=2)["a"] == 1
    )  # neurons
    groups = [dataclasses.replace(group, kind="channels") for group in groups]
    losses = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([9.0, 9, 9, 9])}
    # One unit of a away would do for 80 %; two are removed, and never all four.
    assert allocate_units(Chain(), groups, losses, costs, 0.8, multiple_of=2) == {"a": 2, "b": 0}
    assert allocate_units(Chain(), groups, losses, costs, 0.6, multiple_of=2) == {"a": 2, "b": 2}
    for irregular in (3, 4):  # one at a time: 3 is no divisor of the four units, and all four cannot leave
        assert allocate_units(Chain(), groups, losses, costs, 0.83, multiple_of=irregular) == {"a": 1, "b": 0}
    with pytest.raises(ValueError, match="channels in multiples of 2"):
        allocate_units(Chain(), groups, losses, costs, 0.3, multiple_of=2)


def test_what_saves_more_may_cost_more() -> None:
    each = torch.arange(2)[:, None]
    groups = [Group(n, "neurons", (Cut(n, "out", each),)) for n in "ac"]
    model = Chain()
    model.a, model.c = nn.Linear(9, 2), nn.Linear(1, 2)
    losses = {"a": torch.tensor([2.0, 2]), "c": torch.tensor([1.0, 1])}
    assert allocate_units(model, groups, losses, Costs(100, {"a": 90, "c": 10}, {}), 0.9) == {"a": 1, "c": 0}

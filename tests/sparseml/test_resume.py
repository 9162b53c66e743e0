"""Stop a recipe's training anywhere, go on in a new manager: same masks, same weights, same updates as never having stopped."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
from sparseml.pytorch.optim import ScheduledModifierManager

import capruner.sparseml  # noqa: F401  (registers the modifiers)
from capruner.sparseml.state import load_manager_state, manager_state

STEPS = 4

CAP = """
pruning_modifiers:
  - !CAPruningModifier
      params: [0.weight, 2.weight]
      init_sparsity: {first}
      final_sparsity: {last}
      start_epoch: {start}
      end_epoch: {end}
      update_frequency: {frequency}
      inter_func: linear
      num_grads: 8
      damp: 1.0e-4
      fisher_block_size: 8
"""
LADDER = CAP.format(first=0.25, last=0.5, start=0.0, end=1.0, frequency=0.5) + CAP.format(
    first=0.5, last=0.75, start=1.0, end=2.0, frequency=0.5
).replace("pruning_modifiers:\n", "")
GMP = """
modifiers:
  - !GlobalMagnitudePruningModifier
      params: [0.weight, 2.weight]
      init_sparsity: 0.25
      final_sparsity: 0.75
      start_epoch: 0.0
      end_epoch: 2.0
      update_frequency: 0.5
"""
STAGED = """
first_stage:
  first_modifiers:
    - !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 3.0
  pruning_modifiers:
    - !GlobalMagnitudePruningModifier
        params: [0.weight]
        init_sparsity: 0.25
        final_sparsity: 0.5
        start_epoch: 0.0
        end_epoch: 2.0
        update_frequency: 1.0
"""


class Training:
    """A tiny training whose every step follows from its number, so that it can be cut anywhere."""

    def __init__(self, recipe: str, epoch: float = 0.0, steps: int = STEPS) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.manager = ScheduledModifierManager.from_yaml(recipe)
        self.calibrations = 0
        self.steps, self.step = steps, round(epoch * steps)
        sampler = {"data_loader_builder": self._batches, "loss_function": nn.functional.cross_entropy}
        self.stepper = self.manager.modify(self.model, self.optimizer, steps, epoch=epoch, grad_sampler=sampler)

    def _batches(self, kwargs: Any = None) -> Any:
        self.calibrations += 1
        generator = torch.Generator().manual_seed(self.step)
        while True:
            inputs = torch.randn(8, 8, generator=generator)
            yield [inputs], {}, torch.randint(0, 4, (8,), generator=generator)

    def run(self, until: float) -> list[float]:
        """Train to an epoch; the sparsity after every step."""
        reached = []
        while self.step < round(until * self.steps):
            generator = torch.Generator().manual_seed(1000 + self.step)
            inputs = torch.randn(8, 8, generator=generator)
            targets = torch.randint(0, 4, (8,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), targets).backward()
            self.stepper.step()
            self.step += 1
            reached.append(self.sparsity())
        return reached

    def sparsity(self) -> float:
        weights = torch.cat([self.model[0].weight.flatten(), self.model[2].weight.flatten()])
        return float((weights == 0).float().mean())

    def checkpoint(self) -> Any:
        """Through a file, as a new process would read it."""
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"manager": manager_state(self.manager)}, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    @classmethod
    def resumed(cls, recipe: str, saved: Any, epoch: float) -> Training:
        new = cls(recipe, epoch)
        new.model.load_state_dict(saved["model"])
        new.optimizer.load_state_dict(saved["optimizer"])
        load_manager_state(new.manager, saved["manager"])
        return new


@pytest.mark.parametrize("recipe", [LADDER, GMP], ids=["ladder of CAP", "SparseML's GMP"])
@pytest.mark.parametrize("cut", [0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 2.25, 2.5])
def test_a_resumed_training_ends_with_the_same_bits(recipe: str, cut: float) -> None:
    whole = Training(recipe)
    sparsities = whole.run(3.0)

    first = Training(recipe)
    before = first.run(cut)
    second = Training.resumed(recipe, first.checkpoint(), cut)
    after = second.run(3.0)

    assert before + after == sparsities
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_masks_hold_at_once_after_loading_and_no_update_is_repeated() -> None:
    first = Training(LADDER)
    first.run(1.25)
    second = Training.resumed(LADDER, first.checkpoint(), 1.25)
    with torch.no_grad():
        second.model[0].weight.add_(1.0)
    second.model(torch.randn(1, 8))
    assert second.sparsity() == first.sparsity()
    second.run(1.5)
    assert second.calibrations == 0
    second.run(1.75)
    assert second.calibrations == 1


def test_sparsemls_own_state_dict_carries_the_schedule_of_our_modifiers() -> None:
    recipe = CAP.format(first=0.25, last=0.75, start=0.0, end=2.0, frequency=0.5)
    whole = Training(recipe)
    whole.run(3.0)
    first = Training(recipe)
    first.run(0.75)
    second = Training(recipe, 0.75)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.manager.load_state_dict(first.manager.state_dict())
    second.run(3.0)
    assert torch.equal(whole.model[0].weight, second.model[0].weight)


def test_an_initial_sparsity_read_from_the_parameters_is_not_read_again() -> None:
    recipe = CAP.format(first="__FROM_PARAM__", last=0.75, start=0.0, end=2.0, frequency=0.5)
    recipe = recipe.replace("num_grads", "global_sparsity: False\n      num_grads")
    whole = Training(recipe).run(3.0)
    first = Training(recipe)
    before = first.run(1.25)
    assert before + Training.resumed(recipe, first.checkpoint(), 1.25).run(3.0) == whole


def test_a_staged_recipe_has_a_state() -> None:
    first = Training(STAGED)
    first.run(1.25)
    second = Training.resumed(STAGED, first.checkpoint(), 1.25)
    assert second.run(1.5) == [first.sparsity()]
    assert torch.equal(second.model[0].weight == 0, first.model[0].weight == 0)


def test_the_last_update_comes_though_training_ends_at_end_epoch() -> None:
    training = Training(CAP.format(first=0.25, last=0.75, start=0.0, end=2.0, frequency=0.5))
    training.run(2.0)
    assert training.sparsity() < 0.7
    training.manager.finalize(training.model)
    assert training.sparsity() == 0.75


def test_finalizing_early_prunes_nothing() -> None:
    training = Training(CAP.format(first=0.25, last=0.75, start=0.0, end=2.0, frequency=0.5))
    training.run(1.75)
    before = training.sparsity()
    training.manager.finalize(training.model)
    assert training.sparsity() == before < 0.7


def test_updates_keep_time_though_the_frequency_is_no_multiple_of_a_step() -> None:
    """Due at 0, 0.3, 0.6, 0.9, 1.2, 1.5 with steps each quarter: the first step at or after, so 0, 0.5, 0.75, 1.0, 1.25, 1.5."""
    training = Training(CAP.format(first=0.0, last=0.5, start=0.0, end=1.5, frequency=0.3))
    reached = training.run(2.0)
    expected = [0.0, 0.0, 0.5 / 1.5, 0.75 / 1.5, 1.0 / 1.5, 1.25 / 1.5, 1.0, 1.0]
    assert reached == pytest.approx([0.5 * share for share in expected], abs=1 / 192)


def test_a_state_of_another_recipe_is_refused() -> None:
    saved = manager_state(Training(LADDER).manager)
    with pytest.raises(ValueError, match=r"another recipe: it has .*CAPruningModifier"):
        load_manager_state(Training(GMP).manager, saved)
    changed = Training(LADDER.replace("num_grads: 8", "num_grads: 16"))
    with pytest.raises(ValueError, match="a parameter of a modifier has changed"):
        load_manager_state(changed.manager, saved)


def test_a_state_of_another_model_is_refused_and_the_masks_stay() -> None:
    first, other = Training(LADDER), Training(LADDER)
    first.run(1.0)
    state = manager_state(first.manager)
    (key, modifier) = next((k, v) for k, v in state.items() if any(n.endswith(".sparsity_mask") for n in v))
    name = next(n for n in modifier if n.endswith(".sparsity_mask"))
    missing = {**state, key: {n: v for n, v in modifier.items() if n != name}}
    with pytest.raises(ValueError, match=f"was saved for a different model: {name}"):
        load_manager_state(other.manager, missing)
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 2\) in the state"):
        load_manager_state(other.manager, {**state, key: {**modifier, name: torch.ones(2, 2)}})
    assert other.sparsity() == 0.0


def test_what_sparseml_must_never_ask_our_modifiers_for() -> None:
    manager = ScheduledModifierManager.from_yaml(LADDER)
    modifier = manager.pruning_modifiers[0]
    with pytest.raises(RuntimeError, match="needs an initialized modifier"):
        modifier.load_state_dict({})
    unused = modifier._get_scorer([nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="nothing is scored through SparseML"):
        unused.score_parameters()
    with pytest.raises(RuntimeError, match="no mask is created through SparseML"):
        unused.create_sparsity_masks([], 0.5)

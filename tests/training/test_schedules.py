"""Schedules are plain functions."""

from __future__ import annotations

from typing import Any

import pytest

from capruner.training import schedules


def test_updates_come_every_so_many_epochs_and_end_exactly_at_the_last() -> None:
    assert schedules.linear(0.5, 0.9, 0, 4, 2) == {0: 0.5, 2: pytest.approx(0.7), 4: 0.9}
    assert list(schedules.linear(0.1, 0.9, 1, 6, 2)) == [1, 3, 5, 6]
    assert list(schedules.linear(0.1, 0.9, 0, 2, 0.5)) == [0, 0.5, 1, 1.5, 2]
    assert list(schedules.linear(0.1, 0.9, 2, 3, 5)) == [2, 3]
    third = schedules.linear(0.0, 0.9, 0, 1, 1 / 3)
    assert len(third) == 4
    assert third[1] == 0.9


def test_formulas() -> None:
    assert list(schedules.cubic(0.0, 0.8, 0, 2).values()) == pytest.approx([0.0, 0.7, 0.8])
    assert list(schedules.geometric(0.1, 0.9, 0, 2).values()) == [0.1, pytest.approx(0.7), 0.9]
    for make in (schedules.linear, schedules.cubic, schedules.geometric):
        values = list(make(0.1, 0.97, 0, 10).values())
        assert values == sorted(set(values))
        assert (values[0], values[-1]) == (0.1, 0.97)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.9, 4, 4), "last_epoch must be after first_epoch, got 4 to 4"),
        ((0.9, 0.5, 0, 4), "sparsity must rise from epoch to epoch, got 0.9 at epoch 0 and 0.5 at epoch 4"),
        ((0.5, 90, 0, 4), "must be below 1, got 90: write 0.9 for 90 %"),
        ((0.5, 0.9, 0, 4, 0), "every must be a positive number, got 0"),
        ((0.5, 0.9, -1, 4), "first_epoch must be a number, at least 0, got -1"),
    ],
)
def test_invalid_arguments(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.linear(*arguments)


def test_unknown_interpolation() -> None:
    with pytest.raises(ValueError, match=r"interpolation must be one of .*'cubic'.* got 'square'"):
        schedules.schedule("square", 0.5, 0.9, 0, 4)  # type: ignore[arg-type]


def test_a_sparsity_of_zero_needs_no_update() -> None:
    assert schedules.check_schedule({0: 0.0, 3: 0.8, 1: 0.4}) == {1: 0.4, 3: 0.8}


@pytest.mark.parametrize(
    "wrong", [{}, {0: 0}, 0.5, [0.5], {"0": 0.5}, {0: "0.5"}, {True: 0.5}, {0: {0.5: ["a"]}}, {-1: 0.5}]
)
def test_what_is_not_a_schedule(wrong: object) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        schedules.check_schedule(wrong)


def test_updates_of_a_recipe_s_modifier() -> None:
    assert schedules.update_epochs(0.0, 80.0, 20.0) == [0, 20, 40, 60, 80]
    assert schedules.update_epochs(-1.0, 1.0, 0.4) == pytest.approx([0, 0.4, 0.8, 1])
    assert schedules.update_epochs(2.0, 5.0, -1.0) == [2, 5]
    with pytest.raises(ValueError, match="more than 10,000 updates"):
        schedules.update_epochs(0.0, 10.0, 1e-5)


def test_sparsity_between_the_updates_of_a_recipe_s_modifier() -> None:
    def at(epoch: float, interpolation: Any = "linear", first: float = 1.0) -> float:
        return schedules.sparsity_at(epoch, 0.4, 0.8, first, 5.0, interpolation)

    assert [at(epoch) for epoch in (0, 1, 3, 5, 9)] == pytest.approx([0.4, 0.4, 0.6, 0.8, 0.8])
    assert at(5 - 1e-9) == 0.8
    assert at(3, "cubic") == pytest.approx(0.75)
    assert at(4.5, "inverse_cubic") == pytest.approx(0.6)
    assert at(2.5, first=-1) == pytest.approx(0.6)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "inverse_cubic"])
def test_interpolations_are_sparseml_s_to_the_last_bit(interpolation: Any) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    from sparseml.utils import interpolate

    for start, end in ((0.05, 0.9), (0.4, 0.75)):
        for step in range(97):
            theirs = interpolate(step / 7, 0.0, 97 / 7, start, end, interpolation)
            assert schedules.sparsity_at(step / 7, start, end, 0.0, 97 / 7, interpolation) == theirs

from __future__ import annotations

import pytest
import torch

from capruner import NotPositiveDefiniteError
from capruner.core.numerics import full_precision


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_inside_and_the_caller_s_setting_afterwards(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.is_grad_enabled()


def test_as_a_decorator_it_works_more_than_once() -> None:
    @full_precision()
    def enabled() -> bool:
        return torch.is_grad_enabled()

    assert [enabled(), enabled(), torch.is_grad_enabled()] == [False, False, True]


def test_the_error_can_be_caught_as_a_value_error() -> None:
    assert issubclass(NotPositiveDefiniteError, ValueError)

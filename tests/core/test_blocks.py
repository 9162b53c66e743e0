from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capruner.core.blocks import BlockLayout, fitting, largest

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(
    SHAPES,
    st.integers(1, 50),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_blocks_hold_every_weight_once_and_lead_back(
    shape: tuple[int, ...], B: int, inputs: int | None, dtype: torch.dtype
) -> None:
    layout = BlockLayout.of(shape, B, inputs)
    tensor = numbered(shape).add(1).to(dtype)
    blocks = layout.to_blocks(tensor, dtype)
    assert blocks.shape == (layout.num_blocks, layout.block_size)
    assert blocks.dtype == dtype
    assert torch.equal(layout.from_blocks(blocks), tensor)
    assert layout.from_blocks(blocks).is_contiguous()
    assert torch.equal(blocks == 0, layout.is_padding())
    assert layout.num_blocks * layout.block_size == tensor.numel() + layout.padding
    assert layout.padding < layout.block_size <= max(1, min(B, tensor.numel()))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 50), st.sampled_from([None, 0, 1, 2]), st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_batch_dimensions_are_kept_in_front(
    shape: tuple[int, ...], B: int, inputs: int | None, batch: tuple[int, ...]
) -> None:
    layout = BlockLayout.of(shape, B, inputs)
    tensor = torch.randn(*batch, *shape, dtype=torch.float64)
    blocks = layout.to_blocks(tensor, torch.float64)
    assert blocks.shape == (*batch, layout.num_blocks, layout.block_size)
    one_by_one = [layout.to_blocks(t, torch.float64) for t in tensor.reshape(-1, *shape)]
    assert torch.equal(blocks.flatten(0, -3) if batch else blocks[None], torch.stack(one_by_one))


def test_order_is_row_major_as_stored() -> None:
    assert BlockLayout.of((2, 3), 4).to_blocks(numbered((2, 3))).tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]


def test_channels_last_puts_input_channels_innermost() -> None:
    weight = torch.randn(4, 3, 2, 5)
    blocks = BlockLayout.of(weight.shape, 7, inputs=1).to_blocks(weight)
    assert torch.equal(blocks.reshape(-1)[: weight.numel()], weight.permute(0, 2, 3, 1).reshape(-1))


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 2), (12, 3, 2, 2)])
def test_inputs_that_are_stored_first_run_innermost(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    layout = BlockLayout.of(shape, inputs=0)
    assert torch.equal(layout.to_blocks(weight).reshape(-1)[: weight.numel()], weight.movedim(0, -1).reshape(-1))
    row = weight.numel() // shape[1]
    assert layout.block_size % row == 0 or row % layout.block_size == 0


def test_channels_last_means_nothing_for_a_matrix() -> None:
    assert BlockLayout.of((4, 8), 4, inputs=1) == BlockLayout.of((4, 8), 4)


def test_memory_format_does_not_matter() -> None:
    weight = torch.randn(4, 3, 3, 3)
    layout = BlockLayout.of(weight.shape, 10)
    assert torch.equal(layout.to_blocks(weight.to(memory_format=torch.channels_last)), layout.to_blocks(weight))


def test_masks_are_padded_with_false() -> None:
    layout = BlockLayout.of((5,), 3)
    assert layout.to_blocks(torch.ones(5, dtype=torch.bool), torch.bool).tolist() == [[True] * 3, [True, True, False]]


def test_a_tensor_smaller_than_a_block_is_one_block_of_its_size() -> None:
    layout = BlockLayout.of((3, 4), 192)
    assert (layout.num_blocks, layout.block_size, layout.padding) == (1, 12, 0)
    assert not layout.is_padding().any()


@pytest.mark.parametrize("bad", [0, -1, 2.5, "192", True])
def test_bad_block_sizes(bad: object) -> None:
    with pytest.raises(ValueError, match=r"fisher_block_size must be a positive integer, got .*; None takes what fits"):
        BlockLayout.of((4, 4), bad)  # type: ignore[arg-type]


@given(
    row=st.integers(1, 4096), group=st.sampled_from([1, 2, 4, 8]), rows=st.integers(1, 7), limit=st.integers(192, 512)
)
def test_blocks_that_nobody_sized_cut_no_row_where_they_can_help_it(
    row: int, group: int, rows: int, limit: int
) -> None:
    size = fitting(row, group, limit)
    good = [k for k in range(limit // 2, limit + 1) if k % group == 0 and (row % k == 0 or k % row == 0)]
    assert size == max(good, default=limit - limit % group)
    assert BlockLayout.of((rows, row), group=group, limit=limit).block_size == min(size, rows * row)


def test_small_networks_get_larger_blocks_as_long_as_four_gibibytes_hold_them() -> None:
    assert [largest(weights) for weights in (1, 1_200_000, 2_097_152)] == [512, 512, 512]
    assert largest(3_000_000) == 4 * 2**30 // 12_000_000 == 357
    assert [largest(weights) for weights in (5_600_000, 21_600_000, 86_000_000)] == [192, 192, 192]


@given(weights=st.integers(1, 10**9))
def test_blocks_above_the_published_size_never_take_more_than_four_gibibytes(weights: int) -> None:
    assert 192 <= largest(weights) <= 512
    assert largest(weights) == 192 or 4 * weights * largest(weights) <= 4 * 2**30


def test_sizes_of_known_networks() -> None:
    rows = {"DeiT-Tiny": 192, "DeiT-Small": 384, "DeiT-Base": 768, "its mlp": 3072, "3x3 of 64": 576, "stem": 147}
    assert {name: fitting(row) for name, row in rows.items()} == dict.fromkeys(rows, 192) | {"stem": 147}
    assert (fitting(128), fitting(512), fitting(64), fitting(9)) == (128, 128, 192, 189)
    assert fitting(1021) == 192  # a prime: no size is even


def test_empty_tensor() -> None:
    with pytest.raises(ValueError, match=r"empty tensor of shape \(0, 4\); leave it out of `params`"):
        BlockLayout.of((0, 4), 2)

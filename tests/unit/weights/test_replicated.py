"""How parameters laid end to end are divided among the ranks of a DDP job."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharded_avg.shard import Box, Interval
from sharded_avg.weights.layouts.replicas import digest
from sharded_avg.weights.layouts.replicated import Cut, cut_line, piece

LINES: dict[str, list[Tensor]] = {
    "odd sizes": [torch.zeros(3, 5), torch.zeros(7), torch.zeros(1), torch.zeros(())],
    "one element": [torch.zeros(1)],
    "fewer elements than ranks": [torch.zeros(()), torch.zeros(2)],
    "one long": [torch.zeros(101)],
    "many short": [torch.zeros(1 + number % 3) for number in range(50)],
    "even": [torch.zeros(4), torch.zeros(4, 2)],
}
each_line = pytest.mark.parametrize("name", LINES)
each_world = pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])


def named(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{number}", tensor) for number, tensor in enumerate(tensors)]


@each_line
@each_world
def test_every_element_is_on_exactly_one_rank(name: str, num_ranks: int) -> None:
    params = [(key, tensor.clone()) for key, tensor in named(LINES[name])]
    cuts = cut_line(params, num_ranks)
    assert len(cuts) == num_ranks
    live = dict(params)
    for cut in (cut for mine in cuts for cut in mine):
        assert cut.region.numel > 0
        piece(live[cut.name], cut.region).add_(1)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in live.values())


@each_line
@each_world
def test_ranks_have_equal_shares(name: str, num_ranks: int) -> None:
    """All but the last ranks have ceil(total / ranks) elements; what is left over may leave ranks without any."""
    cuts = cut_line(named(LINES[name]), num_ranks)
    total = sum(tensor.numel() for tensor in LINES[name])
    share = -(-total // num_ranks)
    expected = [max(0, min(share, total - rank * share)) for rank in range(num_ranks)]
    assert [sum(cut.region.numel for cut in mine) for mine in cuts] == expected


@each_line
def test_one_rank_has_everything_in_order(name: str) -> None:
    [cuts] = cut_line(named(LINES[name]), 1)
    assert cuts == [Cut(key, Interval(0, tensor.numel())) for key, tensor in named(LINES[name])]


def test_a_parameter_is_cut_where_the_share_ends() -> None:
    cuts = cut_line(named([torch.zeros(3, 5), torch.zeros(7)]), 3)  # 22 elements, 8 a rank
    assert cuts == [
        [Cut("p0", Interval(0, 8))],
        [Cut("p0", Interval(8, 15)), Cut("p1", Interval(0, 1))],
        [Cut("p1", Interval(1, 7))],
    ]


def test_what_is_not_row_major_goes_whole_to_where_it_begins() -> None:
    params = named([torch.zeros(4), torch.zeros(3, 5).t(), torch.zeros(3)])  # 22 elements, 11 a rank
    cuts = cut_line(params, 2)
    assert cuts == [
        [Cut("p0", Interval(0, 4)), Cut("p1", Box.whole((5, 3)))],
        [Cut("p2", Interval(0, 3))],
    ]


def test_a_piece_is_a_view() -> None:
    parameter = torch.nn.Parameter(torch.arange(15.0).view(3, 5))
    part = piece(parameter, Interval(4, 11))
    assert part.data_ptr() == parameter.data_ptr() + 16
    assert torch.equal(part, torch.arange(4.0, 11.0))
    assert not part.requires_grad


def test_of_nothing_every_rank_has_nothing() -> None:
    assert cut_line([], 3) == [[], [], []]


# --- digests of replicas -------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.int64]
DTYPES += [torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_have_equal_digests(dtype: torch.dtype) -> None:
    """R01: and one bit, or two numbers that changed places, have another."""
    values = [torch.arange(float(numel)).to(dtype) for numel in (35, 1, 0, 7)]
    found = digest(values)
    assert found == digest([value.clone() for value in values])
    assert 0 <= found < 1 << 62
    other = [value.clone() for value in values]
    other[3].view(torch.uint8)[-1] ^= 1
    assert digest(other) != found
    other = [value.clone() for value in values]
    size = other[0].element_size()
    other[0].view(torch.uint8)[: 4 * size] = other[0].view(torch.uint8)[: 4 * size].view(2, -1).flip(0).reshape(-1)
    assert digest(other) != found


def test_no_round_numbers_cancel() -> None:
    """R01: weights such as tests and users write them, permuted."""
    values = torch.tensor([float(2**exponent) for exponent in range(-8, 8)] * 8)
    generator = torch.Generator().manual_seed(0)
    permuted = {digest([values[torch.randperm(128, generator=generator)]]) for _ in range(500)}
    assert len(permuted) == 500
    pairs = {digest([values.index_select(0, order(i, j, 128))]) for i in range(32) for j in range(i + 1, 32)}
    different = sum(bool(values[i] != values[j]) for i in range(32) for j in range(i + 1, 32))
    assert len(pairs - {digest([values])}) == different


def order(i: int, j: int, numel: int) -> Tensor:
    """Of all, with two changed places."""
    places = torch.arange(numel)
    places[[i, j]] = places[[j, i]]
    return places


def test_bits_are_compared_not_numbers() -> None:
    """R01: a NaN equals itself; minus zero is not zero."""
    nan = torch.tensor([float("nan"), 1.0])
    assert digest([nan]) == digest([nan.clone()])
    assert digest([torch.tensor([0.0])]) != digest([torch.tensor([-0.0])])


def test_digests_do_not_depend_on_memory() -> None:
    """R01: slices, other memory formats, and a tensor that is longer than one piece."""
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert digest([values]) == digest([values.t().contiguous().t()]) == digest([torch.cat([values, values])[3:]])
    long = torch.arange(300_001.0)
    other = long.clone()
    other[300_000] += 1
    assert digest([long]) != digest([other])

"""A fingerprint tells values apart, also those that a sum would not."""

from __future__ import annotations

import pytest
import torch

from sharded_avg.exchange.fingerprint import Fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]


def taken(values: torch.Tensor) -> int:
    return int(Fingerprint(values).take())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 2, 3, 8, 9, 65, 4097, 50_001])
def test_tells_values_apart(numel: int, dtype: torch.dtype) -> None:
    """Signs, places, single elements at each end and in the middle."""
    torch.manual_seed(0)
    values = torch.randn(numel + 3).to(dtype)[3:]  # a word may begin inside an element
    own = taken(values)
    assert taken(values.clone()) != 0
    assert own == taken(values)
    others = [-values, values.roll(1), values.flip(0)]
    for index in {0, numel // 2, numel - 1}:
        other = torch.cat([torch.zeros(3, dtype=dtype), values])[3:]  # lies as `values` do
        assert taken(other) == own
        other[index] += 1
        others.append(other)
    for other in others:
        beside = torch.cat([torch.zeros(3, dtype=dtype), other])[3:]
        assert torch.equal(other, values) or taken(beside) != own


def test_any_number_of_threads() -> None:
    values, before = torch.randn(1 << 20), torch.get_num_threads()
    try:
        found = set()
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.add(taken(values))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_nan_is_itself_and_nothing_has_one_too() -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0])
    assert taken(values) == taken(values.clone())
    assert taken(values) != taken(values.abs())
    assert taken(torch.empty(0)) == 0
    assert taken(torch.ones(4, 4).t()) == taken(torch.ones(4, 4))

"""Whether values are finite: every dtype, every way not to be, and nothing copied."""

from __future__ import annotations

import math

import pytest
import torch

from sharded_avg.evaluation.finite import all_finite
from tests.helpers.watch import CountBytes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.complex64, torch.float8_e5m2)
every_bad_value = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@pytest.mark.parametrize("dtype", DTYPES)
@every_bad_value
@pytest.mark.parametrize("where", [0, 7, 34])
def test_one_element_is_enough(dtype: torch.dtype, bad: float, where: int) -> None:
    """P100."""
    tensor = torch.ones(5, 7).to(dtype)
    assert all_finite([torch.ones(3), tensor, torch.ones(1)], None)
    tensor.view(-1)[where] = bad
    assert not all_finite([torch.ones(3), tensor, torch.ones(1)], None)


@every_bad_value
def test_an_imaginary_part_counts(bad: float) -> None:
    assert not all_finite([torch.tensor([1 + 1j, complex(1, bad)])], None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_value_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite([torch.full((3, 5), largest, dtype=dtype), torch.full((), -largest, dtype=dtype)], None)


def test_a_nan_is_not_hidden_by_an_infinity_or_a_number() -> None:
    values = [torch.tensor([3.0, math.nan, 5.0]), torch.tensor([math.inf, math.nan]), torch.tensor([7.0])]
    for value in values[:2]:
        assert not all_finite([value, values[2]], None)
        assert not all_finite([values[2], value], None)


def test_what_has_no_values_is_finite() -> None:
    assert all_finite([], None)
    assert all_finite(iter([torch.empty(0), torch.empty(3, 0, dtype=torch.bfloat16), torch.arange(3)]), None)
    assert all_finite([torch.tensor([True, False])], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied(dtype: torch.dtype) -> None:
    """Also of what is not contiguous: a copy would be 2 to 4 MB."""
    square = torch.ones(1000, 1000, dtype=dtype)
    with CountBytes() as count:
        assert all_finite([square, square.t(), square[:, ::2], torch.nn.Parameter(square)], None)
    assert 0 < count.nbytes < 1000

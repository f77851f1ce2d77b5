"""How rows are grouped for work: nothing lost, nothing twice, no copy, and joined only where memory goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharded_avg.tensors import chunk_numel, coalesce, flatten, is_dense, pack, split


def counted(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


STRIDED = {
    "row-major": (counted(3, 5), True),
    "transposed": (counted(3, 5).t(), True),
    "permuted": (counted(3, 5, 7).permute(2, 0, 1), True),
    "channels last": (counted(2, 3, 5, 7).contiguous(memory_format=torch.channels_last), True),
    "one element": (counted(1), True),
    "0-d": (counted(), True),
    "size-1 dims of any stride": (counted(3, 5).as_strided((1, 3, 1, 5), (99, 5, 7, 1)), True),
    "flat slice": (counted(15)[4:11], True),
    "columns": (counted(3, 5)[:, :3], False),
    "every second": (counted(15)[::2], False),
    "first column": (counted(3, 5)[:, 0], False),
    "expanded": (counted(1, 5).expand(3, 5), False),
    "expanded one": (counted(1).expand(7), False),
}
each_strided = pytest.mark.parametrize("name", STRIDED)
EMPTY = {"1-d": counted(0), "2-d": counted(3, 0), "slice": counted(5)[2:2], "transposed": counted(3, 0).t()}


@each_strided
def test_is_dense(name: str) -> None:
    tensor, expected = STRIDED[name]
    assert is_dense(tensor) is expected


def elements(tensor: Tensor) -> list[float]:
    return sorted(tensor.flatten().tolist())


@each_strided
def test_flatten_shows_the_same_memory(name: str) -> None:
    tensor, dense = STRIDED[name]
    twin = torch.empty_strided(tensor.shape, tensor.stride()) if dense else torch.zeros(tensor.shape)
    flat, other = flatten((tensor, twin))
    assert flat.data_ptr() == tensor.data_ptr()
    assert elements(flat) == elements(tensor)
    if dense:
        assert flat.shape == other.shape == (tensor.numel(),)
        other.copy_(flat)
        assert torch.equal(twin, tensor)
    else:
        assert flat is tensor
        assert other is twin


def test_flatten_leaves_rows_of_different_strides() -> None:
    row = (counted(3, 5).t(), counted(5, 3))
    assert all(now is before for now, before in zip(flatten(row), row, strict=True))


def test_flatten_takes_any_stride_of_dims_of_one_element() -> None:
    left, right = counted(3, 5).as_strided((3, 1, 5), (5, 99, 1)), counted(3, 1, 5)
    assert [tensor.shape for tensor in flatten((left, right))] == [(15,), (15,)]


@pytest.mark.parametrize("name", EMPTY)
def test_empty_rows_vanish(name: str) -> None:
    assert coalesce([(EMPTY[name], EMPTY[name].clone())]) == []
    row = (counted(3), counted(3))
    assert len(coalesce([(EMPTY[name], EMPTY[name].clone()), row, (EMPTY[name], EMPTY[name].clone())])) == 1


def cut(tensor: Tensor, *sizes: int) -> list[Tensor]:
    return list(tensor.split(list(sizes)))


def test_neighbours_are_joined_without_a_copy() -> None:
    live, average = counted(15), counted(15) + 100
    [(left, right)] = coalesce(list(zip(cut(live, 3, 5, 7), cut(average, 3, 5, 7), strict=True)))
    assert (left.data_ptr(), right.data_ptr()) == (live.data_ptr(), average.data_ptr())
    assert torch.equal(left, live)
    assert torch.equal(right, average)


def test_empty_rows_do_not_part_neighbours() -> None:
    live, average = counted(8), counted(8)
    rows = list(zip(cut(live, 3, 0, 5), cut(average, 3, 0, 5), strict=True))
    assert [row[0].numel() for row in coalesce(rows)] == [8]


def test_shaped_neighbours_are_joined_in_memory_order() -> None:
    live, average = counted(21), counted(21)
    rows = [
        (live[:15].view(3, 5).t(), average[:15].view(3, 5).t()),
        (live[15:16].view(()), average[15:16].view(())),
        (live[16:].view(1, 5), average[16:].view(1, 5)),
    ]
    [(left, right)] = coalesce(rows)
    assert torch.equal(left, live)
    assert torch.equal(right, average)


@pytest.mark.parametrize(
    ("live", "average"),
    [
        ([counted(3), counted(5)], cut(counted(8), 3, 5)),  # only one side goes on
        (cut(counted(8), 3, 5), [counted(3), counted(5)]),
        (cut(counted(8), 3, 5)[::-1], cut(counted(8), 3, 5)),  # out of order
        ([counted(9)[:3], counted(9)[4:]], [counted(9)[:3], counted(9)[4:]]),  # a gap
        ([counted(3), counted(4, 2)[:, 0]], cut(counted(7), 3, 4)),  # not flat
    ],
    ids=["live apart", "averages apart", "reversed", "gap", "strided"],
)
def test_what_does_not_go_on_is_not_joined(live: list[Tensor], average: list[Tensor]) -> None:
    assert [row[0].numel() for row in coalesce(list(zip(live, average, strict=True)))] == [t.numel() for t in live]


def test_neighbours_of_two_storages_or_dtypes_are_not_joined() -> None:
    memory = torch.zeros(16, dtype=torch.uint8)
    live = [memory[:8].view(torch.float32), memory[8:].view(torch.bfloat16)]
    assert len(coalesce([(tensor, torch.zeros_like(tensor)) for tensor in live])) == 2


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
@each_strided
def test_split_covers_every_element_once(name: str, limit: int) -> None:
    tensor = STRIDED[name][0]
    marks = torch.zeros(tensor.shape)
    for live, mark in split((tensor, marks), limit):
        assert live.shape == mark.shape
        assert live.numel() <= limit
        assert live.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        mark.copy_(live + 1)
    assert torch.equal(marks, tensor + 1)


@pytest.mark.parametrize("limit", [1, 4, 5, 100])
def test_pack_keeps_order_and_limit(limit: int) -> None:
    rows = [(counted(size), counted(size) + 100) for size in (3, 5, 7, 1)]
    packed = list(pack(rows, limit))
    assert all(0 < sum(row[0].numel() for row in batch) <= limit for batch in packed)
    for side in (0, 1):
        together = torch.cat([row[side] for batch in packed for row in batch])
        assert torch.equal(together, torch.cat([row[side] for row in rows]))


def test_pack_of_nothing() -> None:
    assert list(pack([], 5)) == []


def test_pack_never_gives_an_empty_batch() -> None:
    """The first row fills a batch to the brim, or is longer than one."""
    assert all(list(pack([(counted(n),) for n in sizes], 4)) for sizes in ((4, 4), (9, 1), (5,)))
    assert [len(batch) for batch in pack([(counted(4),), (counted(4),)], 4)] == [1, 1]


def test_chunks_are_smaller_on_a_cpu() -> None:
    assert chunk_numel(torch.device("cpu")) < chunk_numel(torch.device("cuda"))

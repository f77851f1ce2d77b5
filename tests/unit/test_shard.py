"""Regions against brute force: which elements they name, where those lie, and how many Boxes that takes."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
import torch

from sharded_avg.shard import Box, Interval, Patch, Shard, Stretch, boxes_of_interval, patches, put, take

SIZES = (1, 2, 3, 5, 7)
SHAPES = [
    (),
    *((a,) for a in SIZES),
    *product(SIZES, SIZES),
    *product((1, 2, 3, 5), repeat=3),
    *product((1, 2, 3), repeat=4),
    (2, 1, 3, 1, 2),
    (1, 1, 1, 1, 1),
]
EMPTY_SHAPES = [(0,), (0, 3), (3, 0), (2, 0, 3)]


def intervals(shape: tuple[int, ...]) -> list[Interval]:
    """Every interval of the flattening: all of them for small tensors, the shortest and longest for the others."""
    numel = prod(shape)
    every = [Interval(a, b) for a in range(numel + 1) for b in range(a, numel + 1)]
    return every if numel <= 40 else [i for i in every if i.numel < 6 or i.numel > numel - 6 or i.numel % 7 == 0]


def flat_indices(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_of_every_interval(shape: tuple[int, ...]) -> None:
    index = flat_indices(shape)
    limit = max(1, 2 * len(shape) - 1)
    for interval in intervals(shape):
        cut = list(boxes_of_interval(interval, shape))
        assert len(cut) <= limit, interval
        place = 0
        for patch in cut:  # in memory order, without gaps, each a full row-major block of its Box
            assert patch.start == place, interval
            place = patch.stop
            assert patch.box.numel == patch.stop - patch.start > 0, interval
            named = take(index, patch.box).flatten().tolist()
            assert named == list(range(interval.start + patch.start, interval.start + patch.stop)), (interval, patch)
        assert place == interval.numel, interval


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_limit_of_boxes_is_reached_and_no_more(shape: tuple[int, ...]) -> None:
    most = max(len(list(boxes_of_interval(interval, shape))) for interval in intervals(shape))
    assert most <= max(1, 2 * len(shape) - 1)
    if len(shape) > 0 and all(size >= 3 for size in shape[1:]) and shape[0] >= 3:
        assert most == 2 * len(shape) - 1


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_an_empty_tensor_has_no_boxes(shape: tuple[int, ...]) -> None:
    assert list(boxes_of_interval(Interval(0, 0), shape)) == []
    assert patches(Interval(0, 0), shape) == []
    assert patches(Box.whole(shape), shape) == []
    assert Box.whole(shape).numel == 0


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 5)], ids=str)
def test_an_empty_interval_has_no_patches_wherever_it_lies(shape: tuple[int, ...]) -> None:
    for place in range(prod(shape) + 1):
        assert patches(Interval(place, place), shape) == []


def test_patches_of_a_box_are_the_box() -> None:
    box = Box((1, 0), (2, 3))
    assert patches(box, (5, 3)) == [Patch(box, 0, 6)]
    assert patches(Box((2, 0), (0, 3)), (5, 3)) == []
    assert patches(Box.whole(()), ()) == [Patch(Box((), ()), 0, 1)]


def boxes(shape: tuple[int, ...]) -> list[Box]:
    spans = [[(a, b - a) for a in range(size + 1) for b in range(a, size + 1)] for size in shape]
    return [Box(tuple(o for o, _ in span), tuple(n for _, n in span)) for span in product(*spans)]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 1, 3)], ids=str)
def test_take_and_put_agree_for_every_region(shape: tuple[int, ...]) -> None:
    full = torch.randn(shape)
    before = full.clone()
    for region in [*boxes(shape), *intervals(shape)]:
        taken = take(full, region)
        assert taken.shape == (region.lengths if isinstance(region, Box) else (region.numel,))
        assert taken.numel() == region.numel
        target = torch.full(shape, torch.nan)
        put(target, region, taken)
        assert torch.equal(take(target, region), taken)
        written = ~target.isnan()
        assert written.sum().item() == region.numel
        assert torch.equal(target[written], full[written])
    assert torch.equal(full, before)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5)], ids=str)
def test_intervals_of_ranks_put_together_are_the_whole(shape: tuple[int, ...]) -> None:
    """As several ranks hold it: uneven pieces, one of them empty."""
    full, target = torch.randn(shape), torch.full(shape, torch.nan)
    cuts = [0, 2, 2, 5, prod(shape)]
    for start, stop in pairwise(cuts):
        interval = Interval(start, stop)
        local = take(full, interval).clone()
        for patch in patches(interval, shape):  # the way that a checkpoint writes it
            put(target, patch.box, local[patch.start : patch.stop].view(patch.box.lengths))
    assert torch.equal(target, full)


def test_take_of_a_box_is_a_view() -> None:
    full = torch.zeros(5, 3)
    take(full, Box((1, 1), (2, 2))).fill_(1)
    assert full.sum() == 4


def test_take_reads_tensors_that_are_not_contiguous() -> None:
    full = torch.arange(15).reshape(5, 3).T
    assert take(full, Interval(4, 7)).tolist() == full.contiguous().flatten()[4:7].tolist()
    assert torch.equal(take(full, Box((1, 2), (2, 3))), full[1:3, 2:5])


def test_put_refuses_tensors_that_are_not_contiguous() -> None:
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        put(torch.zeros(5, 3).T, Interval(1, 4), torch.ones(3))


def test_put_casts_to_the_dtype_of_the_full_tensor() -> None:
    full = torch.zeros(3, dtype=torch.bfloat16)
    put(full, Interval(1, 3), torch.tensor([1.0, 1 / 3]))
    assert torch.equal(full, torch.tensor([0, 1, 1 / 3]).bfloat16())


def test_shard_with_a_working_copy() -> None:
    """ZeRO: the master is averaged, and forward reads the low-precision copy."""
    master, low = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    shard = Shard("w", torch.Size((5, 1)), Interval(2, 5), master, working=low)
    assert shard.dtype == torch.bfloat16
    assert shard.target is low
    assert Shard("w", shard.shape, shard.region, master).target is master


@pytest.mark.parametrize("trainable", [True, False])
def test_stand_in_is_the_same_on_every_rank(trainable: bool) -> None:
    held = Shard("w", torch.Size((5, 3)), Interval(0, 4), torch.ones(4), trainable=trainable).stand_in()
    empty = Shard("w", torch.Size((5, 3)), Interval(15, 15), torch.ones(0), trainable=trainable).stand_in()
    for stand_in in (held, empty):
        assert stand_in.is_meta
        assert stand_in.shape == (5, 3)
        assert stand_in.dtype == torch.float32
        assert stand_in.requires_grad == trainable


def test_stand_in_of_an_integer_buffer() -> None:
    shard = Shard("n", torch.Size(()), Box.whole(()), torch.tensor(3), trainable=False, is_buffer=True)
    assert shard.stand_in().dtype == torch.int64


SLICES = [
    ((0, 2),),
    ((1, 3),),
    ((4, 1),),
    ((0, 1), (3, 2)),
    ((3, 2), (0, 1)),
    ((0, 2), (2, 1), (4, 1)),
    ((2, 3), (1, 0)),
]
CUT_SHAPES = [((5,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 5, 3), 1), ((2, 3, 5), 2)]


@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), CUT_SHAPES, ids=str)
def test_every_stretch(shape: tuple[int, ...], dim: int, slices: tuple[tuple[int, int], ...]) -> None:
    """An interval of what slices along a dim leave: by torch.cat, and back."""
    index = flat_indices(shape)
    cut = torch.cat([index.narrow(dim, offset, length) for offset, length in slices], dim)
    for interval in intervals(tuple(cut.shape)):
        stretch = Stretch(dim, slices, interval.start, interval.stop)
        assert stretch.cut_shape(shape) == tuple(cut.shape)
        wanted, place = cut.reshape(-1)[interval.start : interval.stop], 0
        for patch in patches(stretch, shape):  # in memory order, without gaps
            assert patch.start == place, stretch
            place = patch.stop
            assert torch.equal(take(index, patch.box).reshape(-1), wanted[patch.start : patch.stop]), (stretch, patch)
        assert place == stretch.numel == interval.numel, stretch
        assert torch.equal(take(index, stretch), wanted), stretch
        full = torch.zeros_like(index)
        put(full, stretch, wanted + 1)
        assert sorted(full[full > 0].tolist()) == sorted((wanted + 1).tolist()), stretch
        assert torch.equal(take(full, stretch), wanted + 1), stretch

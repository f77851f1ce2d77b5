"""What cannot be is refused at construction, by an error of the package that names the value and the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharded_avg import (
    EMA,
    SWA,
    ConfigError,
    LayoutChangedError,
    ShardedAverage,
    ShardedAvgError,
    UnsupportedModelError,
)

RULE = EMA(decay=0.9)


def refused(match: str, error: type[ShardedAvgError] = ConfigError):
    assert issubclass(error, ShardedAvgError)
    return pytest.raises(error, match=match)


@pytest.mark.parametrize(
    "rule", [0.999, None, {}, {"a": 0.9}, {"a.b": RULE}, {"": RULE}, {"manifest": RULE}, {1: RULE}]
)
def test_rule(rule):
    with refused("rule="):
        ShardedAverage(nn.Linear(2, 2), rule)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, "float32", torch.float8_e4m3fn])
def test_dtype(dtype):
    with refused("dtype="):
        ShardedAverage(nn.Linear(2, 2), RULE, dtype=dtype)


@pytest.mark.parametrize("device", ["meta", "no-such-device", "cuda:99", object()])
def test_device(device):
    with refused("device="):
        ShardedAverage(nn.Linear(2, 2), RULE, device=device)


def test_buffers():
    with refused("buffers='skip'"):
        ShardedAverage(nn.Linear(2, 2), RULE, buffers="skip")


def test_schedule():
    with refused("schedule=10"):
        ShardedAverage(nn.Linear(2, 2), RULE, schedule=10)


def test_model_that_is_no_module():
    with refused("not dict"):
        ShardedAverage({"weight": torch.ones(2)}, RULE)


def test_model_without_parameters():
    with refused("no parameters", UnsupportedModelError):
        ShardedAverage(nn.ReLU(), RULE)


def test_lazy_model():
    """P45, L15: a clear message while parameters are uninitialised; after a forward it works."""
    model = nn.Sequential(nn.LazyLinear(3))
    with refused("lazy", UnsupportedModelError):
        ShardedAverage(model, RULE)
    model(torch.ones(2, 5))
    assert ShardedAverage(model, RULE).update()


def test_meta_model():
    with refused("meta device", UnsupportedModelError):
        ShardedAverage(nn.Linear(2, 2, device="meta"), RULE)


def test_include_that_matches_nothing():
    with refused("include matched none"):
        ShardedAverage(nn.Linear(2, 2), RULE, include=lambda name, tensor: False)


def test_include_that_is_no_function():
    with refused("include='weight'"):
        ShardedAverage(nn.Linear(2, 2), RULE, include="weight")


def test_all_frozen():
    with refused("all are frozen"):
        ShardedAverage(nn.Linear(2, 2).requires_grad_(False), RULE)


def test_include_of_an_integer_parameter():
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    with refused("'codes'.*int64"):
        ShardedAverage(model, RULE, include=lambda name, tensor: True)
    assert ShardedAverage(model, RULE).update()


def test_unknown_average():
    average = ShardedAverage(nn.Linear(2, 2), {"a": RULE, "b": SWA()})
    average.update()
    for name in (None, "c"):
        with refused(r"\['a', 'b'\]"), average.swapped(name):
            pass


def test_refusal_leaves_the_model_as_it_was():
    model = nn.Linear(3, 5)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for bad in ({"dtype": torch.int8}, {"device": "meta"}, {"include": lambda n, t: False}, {"buffers": "x"}):
        with pytest.raises(ShardedAvgError):
            ShardedAverage(model, RULE, **bad)
    for name, parameter in model.named_parameters():
        old, pointer, values = before[name]
        assert parameter is old
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)


class TestModelChangedAfterwards:
    """A model wrapped, cut or rebuilt after its average was made."""

    def test_parameter_of_another_shape(self):
        model = nn.Linear(3, 5)
        average = ShardedAverage(model, RULE)
        average.update()
        model.weight = nn.Parameter(torch.ones(5, 4))
        with refused("'weight'.*[Bb]uild a new ShardedAverage", LayoutChangedError):
            average.update()
        assert average.n_averaged == 1

    def test_parameter_gone(self):
        """L16: three averages and two parameters left are an error, not a shorter average."""
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
        average = ShardedAverage(model, RULE)
        del model[1]
        with refused("'1.weight'.*gone", LayoutChangedError):
            average.update()
        assert average.nbytes == 0

    def test_parameter_replaced_by_one_of_the_same_shape_is_followed(self):
        """P13: the live tensor is re-read, by name."""
        model = nn.Linear(3, 5)
        average = ShardedAverage(model, SWA())
        average.update()
        first = model.weight.detach().clone()
        model.weight = nn.Parameter(torch.ones(5, 3))
        average.update()
        with average.summon_full_params() as full:
            assert torch.equal(full["weight"], first.lerp(torch.ones(5, 3), 0.5))


class TestTensorsThatCannotBeAveraged:
    def test_sparse(self):
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.eye(2).to_sparse())
        with refused("sparse", UnsupportedModelError):
            ShardedAverage(model, RULE)

    def test_lazy_buffer(self):
        with refused("lazy", UnsupportedModelError):
            ShardedAverage(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), RULE)

    def test_storage_in_which_torch_cannot_compute(self):
        model = nn.ParameterDict({"z": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
        with refused("'z'.*complex32"):
            ShardedAverage(model, RULE, dtype=torch.float16)
        eighth = nn.ParameterDict({"w": nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))})
        with refused("'w'.*float8"):
            ShardedAverage(eighth, RULE, dtype=None)
        with refused("dtype="):
            ShardedAverage(nn.Linear(2, 2), RULE, dtype=torch.complex64)


def expanded() -> nn.Parameter:
    return nn.Parameter(torch.randn(1, 5).expand(3, 5))


def sliding() -> nn.Parameter:
    return nn.Parameter(torch.randn(9).as_strided((3, 5), (2, 1)))


def folded() -> nn.Parameter:
    return nn.Parameter(torch.randn(17).as_strided((3, 5), (4, 2)))


class TestMemoryThatIsShared:
    """R20: refused at construction, in our own words, and not by torch at the first swap."""

    @pytest.mark.parametrize("make", [expanded, sliding, folded])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_inside_a_parameter(self, make, frozen):
        """R20: an expanded parameter, windows that overlap; what is not averaged may be so."""
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        model[1].weight = make().requires_grad_(not frozen)
        if frozen:
            average = ShardedAverage(model, RULE)
            average.update()
            with average.swapped():
                pass
            return
        with refused(r"'1\.weight'.*strides.*contiguous", UnsupportedModelError):
            ShardedAverage(model, RULE)
        model[1].weight = nn.Parameter(model[1].weight.detach().contiguous())
        average = ShardedAverage(model, RULE)
        average.update()
        with average.swapped():
            pass

    def test_inside_a_buffer(self):
        """R20: a buffer too, if it is averaged."""
        model = nn.Linear(3, 5)
        model.register_buffer("level", torch.ones(1).expand(5))
        ShardedAverage(model, RULE)
        with refused("'level'.*expanded", UnsupportedModelError):
            ShardedAverage(model, RULE, buffers="average")

    def test_inside_a_parameter_that_is_unfrozen_later(self):
        """R20: it cannot join; frozen again, or with memory of its own, training goes on."""
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        model[1].weight = expanded().requires_grad_(False)
        average = ShardedAverage(model, RULE)
        average.update()
        model[1].weight.requires_grad_(True)
        for _ in range(2):
            with refused(r"'1\.weight'.*strides", UnsupportedModelError):
                average.update()
        assert average.n_averaged == 1
        model[1].weight = nn.Parameter(model[1].weight.detach().contiguous())
        assert average.update()
        with average.swapped():
            pass

    def test_of_two_parameters(self):
        """R20: one parameter that is a view of another's rows."""
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 2))
        model[1].weight = nn.Parameter(model[0].weight.detach()[1:3])
        with refused(r"'0\.weight' and '1\.weight' share a part", UnsupportedModelError):
            ShardedAverage(model, RULE)
        model[1].weight.requires_grad_(False)
        ShardedAverage(model, RULE)

    def test_neighbours_in_one_memory_are_fine(self):
        """R20: rows, columns and windows without a common element, and two parameters with all of it in common."""
        flat = torch.randn(7, 6)
        pieces = (flat[:2], flat[2:5, :3], flat[2:5, 3:], flat[5:], flat[5:])
        model = nn.ParameterList([nn.Parameter(piece) for piece in pieces])
        average = ShardedAverage(model, SWA())
        average.update()
        raw = flat.clone()
        with torch.no_grad():
            flat.add_(1)
        average.update()
        with average.swapped():
            assert torch.equal(flat, raw.lerp(raw + 1, 0.5))
        assert torch.equal(flat, raw + 1)
        with average.summon_full_params() as full:
            assert torch.equal(full["4"], (raw.lerp(raw + 1, 0.5))[5:])

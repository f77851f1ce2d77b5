"""Every rule, on the GPU beside the CPU, and on pieces beside whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

import sharded_avg
from sharded_avg import (
    EMA,
    LAWA,
    SWA,
    AbstractRule,
    CosineMerge,
    CustomRule,
    PolynomialAverage,
    PowerAverage,
    ShardedAverage,
    decays,
)

from ..check import check
from ..reference import DECAY, ByHand, Formula, State, assert_same, ema, lerp, swa, trained, warming

SIZES = {"one": (1,), "odd": (37, 53), "large": (65_537,), "even": (64, 128)}
CUTS = (0, 1, 4, 1000, 1003, 4099)
NUM_UPDATES = 6
PAIRS = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, None), (torch.bfloat16, None))


@dataclass(frozen=True)
class Row:
    """A rule, and the same formula on lists of whole tensors."""

    rule: Callable[[], AbstractRule]
    formula: Formula
    ulps: float = 1.0  # by which one update may differ between devices, whoever computes it


def mixed(average: Tensor, live: Tensor, n: int) -> Tensor:
    return average * DECAY + live * (1 - DECAY)


# Two calls, so each device rounds twice, to half a place: up to 2 ulp apart. Besides, torch's CPU rounds the constants
# of these calls to bf16 first, and its GPU does not: 0.9 and 0.1 are off by less than half a place. The package has no
# part in it: on each device its bits are those of the same two calls on plain tensors, and that is asserted apart.
_TWO_CALLS_ULPS = 3.0


def mixed_lists(averages: list[Tensor], lives: list[Tensor], n: int) -> None:
    torch._foreach_mul_(averages, DECAY)
    torch._foreach_add_(averages, lives, alpha=1 - DECAY)


def _merged(n: int) -> float:
    before, after = (0.5 * (1 + cos(pi * k / 9)) for k in (n, n + 1))
    return (before - after) / (1 - after)


def _latest(averages: list[Tensor], lives: list[Tensor], n: int) -> None:
    torch._foreach_copy_(averages, lives)


def _each(averages: list[Tensor], lives: list[Tensor], n: int) -> None:
    for average, live in zip(averages, lives, strict=True):
        average.copy_(mixed(average, live, n))


ROWS = {
    "ema": Row(partial(EMA, decay=DECAY), ema),
    "ema_warmup": Row(partial(EMA, decay=DECAY, warmup=True), warming),
    "ema_half_life": Row(partial(EMA.from_half_life, 3), lerp(lambda n: 1 - 2.0 ** (-1 / 3))),
    "debiased": Row(
        partial(EMA, decay=decays.Debiased(decay=DECAY)), lerp(lambda n: 1 - (1 - (1 - DECAY) / (1 - DECAY ** (n + 1))))
    ),
    "swa": Row(SWA, swa),
    "power": Row(PowerAverage.merge_1_sqrt, lerp(lambda n: 1 - (n / (n + 1)) ** 0.5)),
    "polynomial": Row(partial(PolynomialAverage, 2), lerp(lambda n: 3 / (n + 3))),
    "lawa": Row(partial(LAWA, last=1), _latest),
    "cosine_merge": Row(partial(CosineMerge, 9), lerp(_merged)),
    "avg_fn": Row(partial(CustomRule, avg_fn=mixed), _each),
    "multi_avg_fn": Row(partial(CustomRule, multi_avg_fn=mixed_lists), mixed_lists, _TWO_CALLS_ULPS),
}


class Tensors(nn.Module):
    """Parameters, and nothing that is computed with them."""

    def __init__(self, values: State) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def drawn(step: int, dtype: torch.dtype, sizes: Mapping[str, tuple[int, ...]] = SIZES) -> State:
    """Weights of one step, on the CPU."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()}


@torch.no_grad()
def put(model: nn.Module, values: State) -> None:
    for name, param in trained(model).items():
        param.copy_(values[name])


def averaged(average: ShardedAverage, name: str | None = None) -> State:
    """Full averages, wherever the shards are."""
    with average.summon_full_params(name, offload_to_cpu=False) as full:
        return {key: value.clone() for key, value in full.items()}


@dataclass
class Difference:
    """Of averages on the device from averages on the CPU, by one dtype of weights and one of averages."""

    dtypes: str
    differing: int = 0
    total: int = 0
    ulps: float = 0.0  # the largest, of one update from equal averages, in units of the larger operand's last place

    def __str__(self) -> str:
        if not self.differing:
            return f"{self.dtypes}: equal bits"
        return f"{self.dtypes}: {self.differing} of {self.total} differ, one update by {self.ulps:.2f} ulp at most"


def _beside_cpu(row: Row, weights: torch.dtype, stored: torch.dtype | None, device: torch.device) -> Difference:
    models = [Tensors({k: v.to(place) for k, v in drawn(0, weights).items()}) for place in ("cpu", device)]
    on_cpu, there = (ShardedAverage(model, row.rule(), dtype=stored) for model in models)
    hand = ByHand(row.formula, stored)
    found = Difference(f"{_short(weights)} in {_short(stored or weights)}", total=0)
    before: State = {}
    for step in range(NUM_UPDATES):
        live = drawn(step, weights)
        for model, average in zip(models, (on_cpu, there), strict=True):
            put(model, live)
            assert average.update()
        hand.take({name: value.to(device) for name, value in live.items()})
        now = averaged(there)
        assert_same(now, hand.average, f"{found.dtypes}, update {step + 1}, beside the formula on this device")
        if step:
            found.ulps = max(found.ulps, _ulps(row.formula, before, live, now, step))
        before = {name: value.cpu() for name, value in now.items()}
    expected = averaged(on_cpu)
    found.total = sum(value.numel() for value in expected.values())
    found.differing = sum(int((value != before[name]).sum()) for name, value in expected.items())
    assert found.ulps <= row.ulps, f"{found}: more than {row.ulps:g}"
    return found


def _ulps(formula: Formula, before: State, live: State, now: State, n: int) -> float:
    """How far one update on the device is from the same update on the CPU."""
    expected = {name: value.clone() for name, value in before.items()}
    lives = [live[name].to(value.dtype) for name, value in expected.items()]
    formula(list(expected.values()), lives, n)
    worst = 0.0
    for (name, value), weight in zip(expected.items(), lives, strict=True):
        larger = torch.maximum(before[name].abs(), weight.abs()).double()
        ulp = larger * torch.finfo(value.dtype).eps
        worst = max(worst, float(((now[name].cpu().double() - value.double()).abs() / ulp).max()))
    return worst


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _enter(name: str) -> None:
    @check("bits of the formula on whole tensors of this device; beside the CPU: how many differ", name=name)
    def beside_cpu(device: torch.device) -> str:
        return "; ".join(str(_beside_cpu(ROWS[name], weights, stored, device)) for weights, stored in PAIRS)


for _name in ROWS:
    _enter(_name)


@check("the rows above are all rules of the package")
def every_rule(device: torch.device) -> str:
    public = [getattr(sharded_avg, name) for name in sharded_avg.__all__]
    rules = {thing for thing in public if isinstance(thing, type) and issubclass(thing, AbstractRule)}
    final = {rule for rule in rules if not getattr(rule, "__abstractmethods__", None)}
    missing = final - {type(row.rule()) for row in ROWS.values()}
    assert not missing, f"no row for {sorted(rule.__name__ for rule in missing)}"
    return ", ".join(sorted(rule.__name__ for rule in final))


@check("LAWA: snapshots in pinned host memory, in their own dtype; updates wait for nothing; the bits of the mean")
def lawa(device: torch.device) -> str:
    for kept in (torch.float32, torch.bfloat16):
        model = Tensors({"all": drawn(0, torch.float32, {"all": (3_000_001,)})["all"].to(device)})
        average, seen = ShardedAverage(model, LAWA(last=3, dtype=kept)), []
        for step in range(NUM_UPDATES):
            put(model, drawn(step, torch.float32, {"all": (3_000_001,)}))
            seen.append(model.get_parameter("all").detach().clone().to(kept))
            if step and device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                before = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            try:
                assert average.update()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            if step and device.type == "cuda":
                assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == before, "it allocates"
            latest = seen[-3:]
            total = latest[0].float()
            for value in latest[1:]:
                total = total + value.float()
            assert_same(averaged(average), {"all": total / len(latest)}, f"{_short(kept)}, update {step + 1}")
    return "fp32 and bf16"


@check("parameters cut at odd places have the bits of whole ones, for every rule")
def pieces(device: torch.device) -> str:
    bounds = list(pairwise(CUTS))
    for name, row in ROWS.items():
        for dtype in (torch.float32, torch.bfloat16):
            whole = Tensors({"all": drawn(0, dtype, {"all": (CUTS[-1],)})["all"].to(device)})
            cut = Tensors({f"from{a}": whole.get_parameter("all").detach()[a:b].clone() for a, b in bounds})
            averages = [ShardedAverage(model, row.rule()) for model in (whole, cut)]
            for step in range(NUM_UPDATES):
                live = drawn(step, dtype, {"all": (CUTS[-1],)})["all"].to(device)
                put(whole, {"all": live})
                put(cut, {f"from{a}": live[a:b] for a, b in bounds})
                for average in averages:
                    assert average.update()
            one, many = map(averaged, averages)
            joined = torch.cat([many[f"from{a}"] for a, _ in bounds])
            assert_same({"all": joined}, one, f"{name}, {_short(dtype)}")
    return f"{len(ROWS)} rules, {len(bounds)} pieces"


@check("fp16, bf16, fp64 and complex weights, averaged in the default dtype and in fp32: the bits of the formula")
def dtypes(device: torch.device) -> None:
    fp32, fp64, complex64 = torch.float32, torch.float64, torch.complex64
    by_default = {torch.float16: fp32, torch.bfloat16: fp32, fp64: fp64, complex64: complex64}
    _prove_dtypes(device, by_default)
    _prove_dtypes(device, by_default | {fp64: fp32}, dtype=fp32)


def _prove_dtypes(device: torch.device, stored: dict[torch.dtype, torch.dtype], **options: Any) -> None:
    """`stored`: dtype of weights -> dtype of their average."""
    sizes = {_short(dtype): (7, 11) for dtype in stored}
    first = drawn(0, torch.float32, sizes)
    model = Tensors({name: first[name].to(device, dtype) for name, dtype in zip(sizes, stored, strict=True)})
    average, hand = ShardedAverage(model, EMA(decay=DECAY), **options), ByHand(ema)
    for step in range(NUM_UPDATES):
        put(model, drawn(step, torch.float32, sizes))
        assert average.update()
        _take_each(hand, {name: param.detach().to(stored[param.dtype]) for name, param in trained(model).items()})
    assert_same(averaged(average), hand.average, f"averages, {options or 'by default'}")


def _take_each(hand: ByHand, live: State) -> None:
    """Real and complex apart: torch's calls on lists take one kind."""
    if not hand.n:
        hand.average = {name: value.clone() for name, value in live.items()}
    else:
        for name, value in live.items():
            ema([hand.average[name]], [value], hand.n)
    hand.n += 1


@check("channels_last and transposed weights: the bits of the formula, strides and pointers stay")
def formats(device: torch.device) -> str:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 5, 3)).to(device, memory_format=torch.channels_last)
    model.turned = nn.Parameter(torch.randn(11, 7, device=device).t())
    average, hand = ShardedAverage(model, EMA(decay=DECAY)), ByHand(ema)
    places = {name: (param.data_ptr(), param.stride()) for name, param in trained(model).items()}
    for step in range(NUM_UPDATES):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        assert average.update()
        hand.take(trained(model))
    raw = {name: param.detach().clone() for name, param in trained(model).items()}
    assert_same(averaged(average), hand.average, "averages")
    with average.swapped():
        assert_same(trained(model), hand.average, "inside")
    assert_same(trained(model), raw, "outside")
    assert places == {name: (param.data_ptr(), param.stride()) for name, param in trained(model).items()}
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last), "the model is not channels_last"
    return f"{len(places)} parameters"


@check("several averages from one read have the bits that each has alone")
def several(device: torch.device) -> str:
    rules = {name: ROWS[name].rule() for name in ("ema", "ema_warmup", "swa", "avg_fn")}
    hands = {name: ByHand(ROWS[name].formula) for name in rules}
    model = Tensors({name: value.to(device) for name, value in drawn(0, torch.float32).items()})
    average = ShardedAverage(model, rules)
    for step in range(NUM_UPDATES):
        live = {name: value.to(device) for name, value in drawn(step, torch.float32).items()}
        put(model, live)
        assert average.update()
        for hand in hands.values():
            hand.take(live)
    for name, hand in hands.items():
        assert_same(averaged(average, name), hand.average, name)
    return ", ".join(rules)

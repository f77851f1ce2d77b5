"""Every rule by value: one scalar, x = 1, 3, 2, 6, 4, worked out by hand and from the sources' own formulas."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import nn

import sharded_avg
from sharded_avg import (
    EMA,
    LAWA,
    SWA,
    AbstractRule,
    ConfigError,
    CosineMerge,
    CustomRule,
    Moment,
    PolynomialAverage,
    PowerAverage,
    Schedule,
    ShardedAverage,
    decays,
)
from tests.helpers.models import FORMULAS

XS = [1.0, 3.0, 2.0, 6.0, 4.0]
LAST_FOUR = [3.0, 2.0, 6.0, 4.0]

# rule -> the averages after 1 to 5 updates
AVERAGES = [
    (EMA(decay=0.9), [1, 1.2, 1.28, 1.752, 1.9768]),
    (EMA.from_half_life(2), [1, 1.5857864, 1.7071068, 2.9644661, 3.2677670]),
    (EMA(decay=0.9999, warmup=True), [1, 2.6363636, 2.1590909, 4.8181818, 4.2922078]),
    (EMA(decay=decays.WarmupTF()), [1, 2.6363636, 2.1590909, 4.8181818, 4.2922078]),
    (EMA(decay=decays.WarmupInverseGamma()), [1, 2.2599210, 2.1349640, 3.6688046, 3.7820718]),
    (EMA(decay=decays.WarmupInverseGamma(power=1)), [1, 2, 2, 3, 3.2]),
    (EMA(decay=decays.Debiased(decay=0.9)), [1, 2.0526316, 2.0332103, 3.1866822, 3.3852897]),
    (EMA(decay=decays.HalfLifeShare(share=0.5)), [1, 2.5, 2.25, 3.6376480, 3.7437785]),
    (EMA(decay=decays.Cosine(start=0.5, end=1.0, steps=4)), [1, 1.8535534, 1.8901650, 2.1911007, 2.1911007]),
    # decays 0.625, 0.75, 0.875, 1
    (EMA(decay=decays.Linear(start=0.5, end=1.0, steps=4)), [1, 1.75, 1.8125, 2.3359375, 2.3359375]),
    (SWA(), [1, 2, 2, 3, 3.2]),
    (PowerAverage(1), [1, 2, 2, 3, 3.2]),
    (PowerAverage(2), [1, 2.5, 2.2222222, 3.875, 3.92]),
    (PolynomialAverage(0), [1, 2, 2, 3, 3.2]),
    (PolynomialAverage(1), [1, 2.3333333, 2.1666667, 3.7, 3.8]),
]

WEIGHTS = [
    (EMA(decay=0.9), [0.1] * 4),
    (EMA.from_half_life(2), [0.2928932] * 4),
    (EMA(decay=decays.WarmupTF()), [0.8181818, 0.75, 0.6923077, 0.6428571]),
    (EMA(decay=decays.WarmupInverseGamma()), [0.6299605, 0.4807499, 0.3968503, 0.3419952]),
    (EMA(decay=decays.Cosine(start=0.5, end=1.0, steps=4)), [1 - 0.5732233, 0.25, 1 - 0.9267767, 0]),
    (EMA(decay=decays.HalfLifeShare(share=0.5)), [0.75, 0.5, 1 - 0.6299605, 1 - 0.7071068]),
    (SWA(), [1 / 2, 1 / 3, 1 / 4, 1 / 5]),
    (PowerAverage.merge_1_sqrt(), [0.2928932, 0.1835034, 0.1339746, 0.1055728]),
    (PowerAverage(2), [0.75, 0.5555556, 0.4375, 0.36]),
    (PowerAverage.from_sigma_rel(0.10), [0.9959200, 0.9599750, 0.8980620, 0.8298600]),
    (PolynomialAverage(1), [2 / 3, 1 / 2, 2 / 5, 1 / 3]),
]

LAST = [
    (PowerAverage.merge_1_sqrt(), XS, 2.4284960),
    (PowerAverage.merge_1_sqrt(), LAST_FOUR, 3.4036237),  # the offline merge: .5, .2071068, .1589186, .1339746
    (PowerAverage.from_sigma_rel(0.10), XS, 4.2715930),
    (CosineMerge(4), LAST_FOUR, 3.8535534),  # the offline merge: .1464466, .3535534, .3535534, .1464466
]


def averages_of(rule, xs, schedule=None) -> list[float]:
    """What a ShardedAverage of one scalar comes to after each update; in float64."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float64))])
    average, found = ShardedAverage(model, rule, schedule=schedule), []
    for x in xs:
        with torch.no_grad():
            model[0].fill_(x)
        if average.update():
            with average.summon_full_params() as full:
                found.append(full["0"].item())
    return found


@pytest.mark.parametrize(("rule", "expected"), AVERAGES, ids=repr)
def test_averages(rule, expected):
    assert averages_of(rule, XS) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(("rule", "expected"), WEIGHTS, ids=repr)
def test_weights(rule, expected):
    assert [rule.weight(Moment(n)) for n in range(1, 5)] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("rule", "xs", "expected"), LAST, ids=repr)
def test_last_average(rule, xs, expected):
    assert averages_of(rule, xs)[-1] == pytest.approx(expected, abs=6e-8)


def test_warmup_exponential():
    decay = decays.WarmupExponential(decay=0.9999, tau=2000)
    assert [decay(t) for t in (1, 1000, 2000)] == pytest.approx([0.00049983, 0.39342999, 0.63205735], abs=5e-9)


def test_inverse_gamma_reaches_what_its_source_says():
    """k-diffusion: power 2/3 reaches 0.999 at 31.6 K and 0.9999 at 1 M; 3/4 at 10 K and 215.4 K."""
    for power, decay, t in ((2 / 3, 0.999, 31_600), (3 / 4, 0.999, 10_000), (3 / 4, 0.9999, 215_400)):
        value = decays.WarmupInverseGamma(power=power, max=1)(t)
        assert 1 - value == pytest.approx(1 - decay, rel=1e-3)
    bounded = decays.WarmupInverseGamma(min=0.5, max=0.9)
    assert [bounded(t) for t in (0, 1e9)] == [0.5, 0.9]


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"), [(0.05, 16.9721986), (0.10, 6.9372039), (0.15, 3.5578688), (0.25, 0.7198240)]
)
def test_sigma_rel_and_back(sigma_rel, gamma):
    rule = PowerAverage.from_sigma_rel(sigma_rel)
    assert rule.power - 1 == pytest.approx(gamma, abs=5e-8)
    assert rule.sigma_rel == pytest.approx(sigma_rel, rel=1e-14)


def test_the_widest_profile_is_the_plain_mean():
    assert PowerAverage.from_sigma_rel(math.sqrt(1 / 12)).power == pytest.approx(1, abs=1e-7)
    assert PowerAverage(1).sigma_rel == math.sqrt(1 / 12)


def test_half_life_share():
    """After training has grown by its share, the weights of before have lost half of their part."""
    rule = PowerAverage.from_half_life_share(0.05)
    assert rule.power == math.log(2) / 0.05
    kept = math.prod(1 - rule.weight(Moment(n)) for n in range(100_000, 105_000))
    assert kept == pytest.approx(0.5, rel=0.03)
    theirs = EMA(decay=decays.HalfLifeShare(share=0.05))
    assert rule.weight(Moment(100_000)) == pytest.approx(theirs.weight(Moment(100_000)), rel=1e-4)


def test_cosine_merge_stays_when_it_is_whole():
    assert averages_of(CosineMerge(4), [*LAST_FOUR, 100.0, 200.0])[3:] == pytest.approx([3.8535534] * 3, abs=5e-8)


def test_every_rule_is_here_and_in_the_tables_of_engines():
    """Its worked example here (LAWA's in averages/test_ring.py), and its formula in tests/helpers/models.py."""
    public = [*vars(sharded_avg).values(), *vars(decays).values()]
    classes = [kind for kind in public if isinstance(kind, type) and not kind.__name__.startswith(("_", "Abstract"))]
    rules = {kind for kind in classes if issubclass(kind, (AbstractRule, decays.AbstractDecay))}

    def kinds(found: Iterable[AbstractRule]) -> set[type]:
        return {kind for rule in found for kind in (type(rule), type(getattr(rule, "decay", None)))}

    by_value = kinds(rule for rule, *_ in AVERAGES + LAST)
    assert rules - by_value == {LAWA, CustomRule, decays.WarmupExponential}
    held = kinds(formula.rule for formula in FORMULAS.values())
    assert rules - held == {decays.WarmupTF}  # EMA(warmup=True), by its other name


# -- the stride ----------------------------------------------------------------------------------------------------


def test_half_life_is_in_optimizer_steps_under_any_schedule():
    """Defect 17: after 2,000 steps the first weights have half of the average, at any stride, and without one."""
    irregular = {7, 8, 300, 301, 999, 1500, 2007}
    for every, schedule in (
        (1, None),
        (10, Schedule(every_steps=10)),
        (400, Schedule(every_steps=400)),
        (0, lambda step: step in irregular),
    ):
        first = every or 7
        xs = [1.0] * first + [0.0] * 2000
        assert averages_of(EMA.from_half_life(2000), xs, schedule)[-1] == pytest.approx(0.5, rel=1e-9)


def test_strides_of_a_decay_per_step():
    """decay 0.9 and a stride of 4 is 0.6561; so is a batch four times as large (arXiv 2307.13813)."""
    xs = [1.0] * 4 + [2.0] * 4
    assert averages_of(EMA(decay=0.9, per="step"), xs, Schedule(every_steps=4))[-1] == pytest.approx(2 - 0.6561)
    assert averages_of(EMA(decay=0.9), xs, Schedule(every_steps=4))[-1] == pytest.approx(1.1)
    assert EMA(decay=0.9).scaled(4).weight(Moment(3)) == pytest.approx(1 - 0.6561)
    assert EMA(decay=0.9).scaled(8).scaled(0.5) == EMA(decay=0.9).scaled(4)


@pytest.mark.parametrize("rule", [SWA(), PowerAverage(2), PolynomialAverage(1), PowerAverage.from_sigma_rel(0.2)])
def test_shapes_by_the_number_of_updates_have_no_stride(rule):
    strided = averages_of(rule, [x for x in XS for _ in range(3)], Schedule(every_steps=3))
    assert strided == averages_of(rule, XS)


def test_times_in_steps_are_steps_under_a_stride():
    """The offline merge of the same four snapshots, 10 steps apart; and a ramp that ends after its steps."""
    xs = [x for x in LAST_FOUR for _ in range(10)]
    assert averages_of(CosineMerge(40), xs, Schedule(every_steps=10))[-1] == pytest.approx(3.8535534, abs=5e-8)
    ramp = EMA(decay=decays.Cosine(start=0.5, end=1.0, steps=40), per="step")
    expected = [0.5732233**10, 0.75**10, 0.9267767**10, 1]
    assert [1 - ramp.weight(Moment(n, 10 * n, 10)) for n in range(1, 5)] == pytest.approx(expected, rel=1e-6)


def test_debiased_is_the_zero_initialised_average_corrected():
    """Written as its source has it: a sum that begins at zero, divided by 1 - decay^n; with a stride, too."""
    for stride in (1, 3):
        decay, total, expected = 0.9**stride, 0.0, []
        for n, x in enumerate(XS, start=1):
            total = decay * total + (1 - decay) * x
            expected.append(total / (1 - decay**n))
        rule = EMA(decay=decays.Debiased(decay=0.9), per="step")
        xs = [x for x in XS for _ in range(stride)]
        assert averages_of(rule, xs, Schedule(every_steps=stride)) == pytest.approx(expected, rel=1e-12)


def test_half_life_in_images():
    assert EMA.from_half_life(images=2_000_000, batch_size=1000) == EMA.from_half_life(2000)


def test_an_update_out_of_turn_at_the_same_step_has_no_weight_per_step():
    """The end of an epoch falls on a step that was taken in: no time has passed."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    average = ShardedAverage(model, EMA.from_half_life(2))
    for x in (1.0, 2.0):
        model[0].data.fill_(x)
        average.update()
    with average.summon_full_params() as full:
        before = full["0"].item()
    model[0].data.fill_(9.0)
    average.update(unscheduled=True)
    with average.summon_full_params() as full:
        assert full["0"].item() == before


# -- what cannot be ------------------------------------------------------------------------------------------------

CANNOT_BE = [
    (lambda: PowerAverage(0), r"power=0\)"),
    (lambda: PowerAverage(math.inf), r"power=inf\)"),
    (lambda: PowerAverage("2"), r"power='2'\)"),
    (lambda: PowerAverage.from_sigma_rel(0), r"sigma_rel=0\).*\(0, 0\.288675\]"),
    (lambda: PowerAverage.from_sigma_rel(0.3), r"sigma_rel=0\.3\)"),
    (lambda: PowerAverage.from_half_life_share(-1), r"share=-1\)"),
    (lambda: PolynomialAverage(-0.1), r"eta=-0\.1\)"),
    (lambda: CosineMerge(0), r"steps=0\)"),
    (lambda: EMA.from_half_life(), "give steps, or images and batch_size"),
    (lambda: EMA.from_half_life(3, images=4, batch_size=5), "give steps, or images and batch_size"),
    (lambda: EMA.from_half_life(images=4), r"images=4\): give steps, or images and batch_size"),
    (lambda: EMA.from_half_life(images=4, batch_size=0), r"batch_size=0\)"),
    (lambda: EMA(decay=0.9).scaled(0), r"batch_factor=0\)"),
    (lambda: EMA(decay=0.9, per="epoch"), r"per='epoch'\)"),
    (lambda: EMA(decay=decays.WarmupTF(), warmup=True), "its own beginning"),
    (lambda: decays.WarmupTF(decay=1.1), r"decay=1\.1\)"),
    (lambda: decays.WarmupTF(factor=0.5), r"factor=0\.5\)"),
    (lambda: decays.WarmupInverseGamma(inv_gamma=0), r"inv_gamma=0\)"),
    (lambda: decays.WarmupInverseGamma(power=-1), r"power=-1\)"),
    (lambda: decays.WarmupInverseGamma(min=0.9, max=0.5), r"min=0\.9\)"),
    (lambda: decays.WarmupExponential(tau=0), r"tau=0\)"),
    (lambda: decays.Cosine(start=0.5, end=1.5, steps=3), r"Cosine\(end=1\.5\)"),
    (lambda: decays.Linear(start=0.5, end=1, steps=0), r"Linear\(steps=0\)"),
    (lambda: decays.Debiased(decay=1), r"decay=1\).*\[0, 1\)"),
    (lambda: decays.HalfLifeShare(share=0), r"share=0\)"),
]


@pytest.mark.parametrize(("make", "says"), CANNOT_BE)
def test_settings_that_cannot_be(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("rule", [rule for rule, *_ in AVERAGES + LAST], ids=repr)
def test_rules_are_frozen_values_that_a_manifest_can_name(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    settings = json.loads(json.dumps(rule.settings()))
    assert settings["kind"] == type(rule).__name__


def test_settings_tell_decays_apart():
    plain = {"kind": "EMA", "decay": 0.9, "warmup": False}
    assert EMA(decay=0.9).settings() == plain  # as older packages wrote it
    assert EMA(decay=0.9).scaled(4).settings() == {**plain, "batch_factor": 4}
    assert EMA.from_half_life(1).settings() == {**plain, "decay": 0.5, "per": "step"}
    cosine = decays.Cosine(start=0.9, end=1, steps=5)
    told = {"kind": "Cosine", "start": 0.9, "end": 1, "steps": 5}
    assert EMA(decay=cosine).settings() == {**plain, "decay": told}

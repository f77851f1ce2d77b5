"""Profiles of power averages, and mixtures of them, by value (EDM2, arXiv 2312.02696)."""

from __future__ import annotations

import math

import pytest
import torch

from sharded_avg import ConfigError
from sharded_avg.rules.power_profiles import Mixture, PowerProfile, gamma_of, gamma_of_rule, sigma_rel_of

P = PowerProfile


def integral(function, stop: float, count: int = 20_000) -> float:
    step = stop / count
    return math.fsum(function((i + 0.5) * step) for i in range(count)) * step


def test_a_density():
    profile = P(6.9, 5.0)
    assert integral(profile.at, 6.0) == pytest.approx(1, rel=1e-3)
    mean = integral(lambda tau: tau * profile.at(tau), 5.0)
    square = integral(lambda tau: tau**2 * profile.at(tau), 5.0)
    assert math.sqrt(square - mean**2) / 5.0 == pytest.approx(sigma_rel_of(6.9), rel=1e-3)
    assert profile.at(5.1) == profile.at(0.0) == 0


@pytest.mark.parametrize("a", [P(1, 2), P(3, 4), P(0, 3), P(16.9, 1000)])
@pytest.mark.parametrize("b", [P(1, 4), P(3, 2), P(-0.3, 3), P(6.9, 1000)])
def test_products_are_integrals(a, b):
    expected = integral(lambda tau: a.at(tau) * b.at(tau), min(a.length, b.length))
    assert a.dot(b) == pytest.approx(expected, rel=5e-3)
    assert a.dot(b) == pytest.approx(b.dot(a))


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"), [(0.05, 16.9721986), (0.10, 6.9372039), (0.15, 3.5578688), (0.25, 0.7198240)]
)
def test_worked_sigma_rel(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-8)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, abs=1e-8)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, math.nan, True, "0.1"])
def test_widths_that_there_are_not(sigma_rel):
    with pytest.raises(ConfigError, match="sigma_rel"):
        gamma_of(sigma_rel)


SAVED = [P(1, 2), P(1, 4), P(3, 2), P(3, 4)]


def test_worked_mixture():
    found = Mixture.of(SAVED, P(2, 4))
    assert found.coefficients == pytest.approx([-0.0825741, 0.5640654, 0.0381610, 0.4803477], abs=5e-8)
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-15)
    assert found.amplification == pytest.approx(1.1651481, abs=1e-7)


def test_the_plain_solution_divided_by_its_sum():
    """By a solver that is not ours."""
    matrix = torch.tensor([[p.dot(q) for q in SAVED] for p in SAVED], dtype=torch.float64)
    plain = torch.linalg.solve(matrix, torch.tensor([p.dot(P(2, 4)) for p in SAVED], dtype=torch.float64))
    assert plain.tolist() == pytest.approx([-0.0827880, 0.5655272, 0.0382598, 0.4815925], abs=5e-8)
    assert float(plain.sum()) == pytest.approx(1.0025914, abs=5e-8)
    assert Mixture.of(SAVED, P(2, 4)).coefficients == pytest.approx((plain / plain.sum()).tolist(), abs=1e-12)


def test_what_was_saved_is_taken_as_it_is():
    found = Mixture.of(SAVED, P(3, 4))
    assert found.coefficients == pytest.approx((0, 0, 0, 1), abs=1e-14)
    assert found.coefficients[:3] == (0, 0, 0), "exactly, so that the others need not be read"
    assert found.error == pytest.approx(0, abs=1e-7)


def test_error_is_the_distance():
    found = Mixture.of(SAVED, P(2, 4))
    distance = integral(lambda tau: (found.at(tau) - found.target.at(tau)) ** 2, 4.0)
    assert found.error == pytest.approx(math.sqrt(distance / found.target.dot(found.target)), rel=1e-3)


def test_what_is_dependent_is_shared_out():
    """One snapshot twice, and hundreds of near neighbours: no huge numbers of opposite sign."""
    twice = Mixture.of([*SAVED, P(3, 4)], P(3, 4))
    assert twice.coefficients[3] + twice.coefficients[4] == pytest.approx(1)
    gammas = [gamma_of(0.05), gamma_of(0.10)]
    long = [P(gamma, length) for length in range(500, 100_001, 500) for gamma in gammas]
    found = Mixture.of(long, P(gamma_of(0.12), 100_000))
    assert found.error < 1e-3
    assert found.amplification < 2


@pytest.mark.parametrize(
    ("profiles", "target", "says"),
    [([], P(2, 4), "no saved averages"), ([P(1, 5)], P(2, 4), "goes on after"), ([P(1, 1e-9)], P(300, 4), "in common")],
)
def test_mixtures_that_there_are_not(profiles, target, says):
    with pytest.raises(ConfigError, match=says):
        Mixture.of(profiles, target)


@pytest.mark.parametrize(("gamma", "length"), [(-0.5, 1), (math.nan, 1), (1, 0), (1, math.inf), (math.inf, 1)])
def test_profiles_that_there_are_not(gamma, length):
    with pytest.raises(ConfigError, match="PowerProfile"):
        P(gamma, length)


@pytest.mark.parametrize(
    ("settings", "gamma"),
    [
        ({"kind": "PowerAverage", "power": 7.5}, 6.5),
        ({"kind": "SWA"}, 0.0),
        ({"kind": "PolynomialAverage", "eta": 0}, 0),
        ({"kind": "PolynomialAverage", "eta": 7}, 7),
        ({"kind": "PowerAverage", "power": 0.5}, None),  # no norm
        ({"kind": "EMA", "decay": 0.9}, None),
        ({"kind": "PowerAverage"}, None),
        ({"kind": "PowerAverage", "power": "large"}, None),
        ({"kind": "PowerAverage", "power": True}, None),
        ({}, None),
    ],
)
def test_rules_with_a_profile(settings, gamma):
    assert gamma_of_rule(settings) == gamma

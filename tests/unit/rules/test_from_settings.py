"""What a manifest says of a rule is enough to have the rule again."""

from __future__ import annotations

import json

import pytest
import torch

from sharded_avg import EMA, LAWA, SWA, CosineMerge, CustomRule, PolynomialAverage, PowerAverage, decays
from sharded_avg.rules import from_settings
from sharded_avg.rules.base import AbstractRule
from sharded_avg.rules.from_settings import rule_of

RULES = [
    SWA(),
    PowerAverage(7.94),
    PolynomialAverage(1),
    CosineMerge(steps=7),
    LAWA(last=3),
    LAWA(last=3, every=10, dtype=torch.bfloat16),
    EMA(decay=0.9),
    EMA(decay=0.9, warmup=True),
    EMA.from_half_life(images=500, batch_size=7).scaled(4),
    EMA(decay=decays.WarmupTF(decay=0.99, factor=3)),
    EMA(decay=decays.WarmupInverseGamma(power=0.75)),
    EMA(decay=decays.WarmupExponential(tau=30)),
    EMA(decay=decays.Cosine(start=0.5, end=1, steps=4)),
    EMA(decay=decays.Linear(start=0.5, end=1, steps=4)),
    EMA(decay=decays.Debiased(decay=0.9)),
    EMA(decay=decays.HalfLifeShare(share=0.05), per="step"),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_there_and_back(rule):
    assert rule_of(json.loads(json.dumps(rule.settings()))) == rule


def test_every_rule_is_known():
    kinds = [AbstractRule]
    for kind in kinds:
        kinds += [sub for sub in kind.__subclasses__() if sub.__module__.startswith("sharded_avg.rules")]
    final = {kind for kind in kinds if not kind.__name__.startswith("Abstract")} - {CustomRule}
    assert final == set(from_settings._RULES.values()), "a new rule has its name in rules/from_settings.py"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "CustomRule", "function": "f"},
        {"kind": "EMA", "decay": 2},
        {"kind": "EMA", "decay": 0.9, "of a later version": 1},
        {"kind": "EMA", "decay": {"kind": "of a later version"}},
        {"kind": "EMA", "decay": {"kind": "AbstractDecay"}},
        {"kind": "EMA", "decay": {}},
        {"kind": ["EMA"]},
        {"kind": "LAWA", "last": 3, "every": 1, "dtype": "nn"},
        {"kind": "merge", "method": "uniform"},
    ],
)
def test_what_is_no_rule_of_ours(settings):
    assert rule_of(settings) is None

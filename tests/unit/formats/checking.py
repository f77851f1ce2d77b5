"""What every sample of another tool's checkpoint must come to."""

from __future__ import annotations

import torch

from sharded_avg.formats.importers import find_importer
from tests.helpers.foreign import (
    NAMES,
    RAW,
    Sample,
)


def check(sample: Sample, format: str, forced: str | None = None) -> None:
    found = find_importer(sample.path, forced)
    assert found is not None
    assert found.format == format
    source = found.open(NAMES if sample.needs_names else None)
    assert set(source.infos) == set(sample.average)
    for name, expected in sample.average.items():
        value = source.read(name)
        assert (source.infos[name].shape, source.infos[name].dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(value, expected)
        assert name not in RAW or not torch.equal(value, RAW[name].to(value.dtype))
    assert source.facts["format"] == format
    assert {key: source.facts[key] for key in sample.facts} == sample.facts

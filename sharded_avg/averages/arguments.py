"""What `ShardedAverage` is given, checked: each function returns a value in its canonical form or says why not."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from ..errors import ConfigError
from ..rules.base import AbstractRule
from ..rules.schedule import Schedule, WhenFn
from ..weights.buffers import BufferPolicy
from .ring import Ring
from .store import AverageDtype

DEFAULT_NAME = "average"
MANIFEST_KEY = "manifest"  # stands beside the averages' names in a state dict
RESERVED = (MANIFEST_KEY, "beside")  # what else a saved folder has: checkpoint/manifest.py
BUFFER_POLICIES = ("copy", "average")


def as_rules(rule: AbstractRule | Mapping[str, AbstractRule]) -> dict[str, AbstractRule]:
    """The rules by name; a single one is called "average"."""
    rules = {DEFAULT_NAME: rule} if isinstance(rule, AbstractRule) else rule
    if not isinstance(rules, Mapping) or not rules:
        raise ConfigError(
            f"rule={rule!r}: give a rule such as EMA(decay=0.999), or a non-empty mapping of names to rules; wrap a "
            "function of your own in CustomRule(avg_fn=...)"
        )
    for name, value in rules.items():
        if not isinstance(name, str) or not name or name in RESERVED or set(name) & set("./\\"):
            raise ConfigError(
                f"rule={{{name!r}: ...}}: an average's name is a non-empty string without dots and slashes, and not "
                f"{' or '.join(map(repr, RESERVED))}"
            )
        if not isinstance(value, AbstractRule):
            raise ConfigError(
                f"rule={{{name!r}: {value!r}}}: not a rule; use EMA(...), SWA() or CustomRule(avg_fn=...)"
            )
    return dict(rules)


def rings_of(rules: Mapping[str, AbstractRule]) -> list[Ring]:
    """Room for the snapshots that some rules keep."""
    asked = {name: rule.snapshots() for name, rule in rules.items()}
    return [Ring(name, size, dtype) for name, (size, dtype) in asked.items() if size]


def as_schedule(schedule: WhenFn | None) -> WhenFn:
    """The schedule; every step if `None`."""
    if schedule is None:
        return Schedule()
    if not callable(schedule):
        raise ConfigError(
            f"schedule={schedule!r}: give Schedule(every_steps=..., start_step=...) or a callable from the step "
            "(counted from 1) to a bool"
        )
    return schedule


def as_dtype(dtype: AverageDtype) -> AverageDtype:
    """As it is given; complex parameters take the complex dtype of a floating-point one."""
    if dtype is None or dtype == "auto":
        return dtype
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    raise ConfigError(
        f"dtype={dtype!r}: averages are stored in a floating-point dtype of at least 16 bits, for example "
        'torch.float32; "auto" is float32, or a parameter\'s own where that is wider'
    )


def as_device(device: torch.device | str | None) -> torch.device | None:
    """A device that this process can allocate on, with its index; `None` for where each shard lives."""
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device={device!r} cannot be used in this process ({error}); use None to keep averages beside the "
            'shards, or "cpu" for host memory'
        ) from error
    if found.type == "meta":
        raise ConfigError(f'device={device!r} holds no values; use None, or "cpu" for host memory')
    return found


def as_buffers(buffers: str | Mapping[str, str] | BufferPolicy) -> BufferPolicy:
    """Which buffers are averaged, as a predicate, of those that can be; in a mapping the first pattern that fits says.

    Patterns are those of `fnmatch`, case-sensitive: `*` matches dots, too.
    """
    if isinstance(buffers, str) and buffers in BUFFER_POLICIES:
        return lambda name, tensor: buffers == "average"
    if isinstance(buffers, Mapping):
        patterns = tuple(buffers.items())
        for pattern, policy in patterns:
            if not isinstance(pattern, str) or policy not in BUFFER_POLICIES:
                raise ConfigError(
                    f"buffers={{{pattern!r}: {policy!r}}}: a pattern of names, such as '*.running_*', and \"copy\" or "
                    '"average"'
                )
        return lambda name, tensor: (
            next((policy for pattern, policy in patterns if fnmatchcase(name, pattern)), "copy") == "average"
        )
    if callable(buffers):
        return buffers
    raise ConfigError(
        f'buffers={buffers!r}: "copy" uses the live buffers, "average" averages floating-point persistent ones, '
        "{'*.running_*': \"average\"} some of them by name, and so does a callable (name, tensor) -> bool"
    )


def check_storage(name: str, dtype: torch.dtype) -> None:
    """Raise unless a parameter's average can be computed in `dtype`."""
    if dtype.itemsize == 1 or dtype == torch.complex32:
        raise ConfigError(
            f"the average of {name!r} would be stored as {dtype}, in which torch cannot average: pass "
            "dtype=torch.float32"
        )

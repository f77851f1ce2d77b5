"""Importing this enters every check into the table."""

from . import engines, graphs, memory, rules, speed, streams, suite, swaps, trainer, training, zero  # noqa: F401

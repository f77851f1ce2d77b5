"""Importing this enters every check into the table."""

from . import (  # noqa: F401
    engines,
    graphs,
    memory,
    rules,
    speed,
    streams,
    suite,
    swaps,
    trainer,
    training,
    two_ranks,
    zero,
)

"""Long tables: `make test` runs a set of their rows that covers them, `make test-all` every row (tests/conftest.py).

@pytest.mark.parametrize("name", covered_by(("ddp", "fsdp2"), NAMES))      # the others are further rows
@pytest.mark.parametrize("size", [3, further(5), further(7)])
@on_ranks(2, further=(3, 4))

@pytest.mark.each_value       # of a product: every value of every parameter in some row, the others are further
@pytest.mark.each_pair        # the same of every pair of values: neighbours are tested together
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mixed", [True, False])
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

STRENGTHS = {"each_value": 1, "each_pair": 2}
Row = tuple[tuple[str, str], ...]  # of a product: which value each parameter has, by what it looks like


def further(*row: Any, id: str | None = None) -> Any:
    """A row that only `--all` runs, because others cover what it could find."""
    return pytest.param(*row, marks=pytest.mark.further, id=id)


def covered_by(rows: Container[Any], table: Iterable[Any]) -> list[Any]:
    """The whole table, in its order. What is not in `rows` is a further row; a row of several arguments is a tuple."""
    return [row if row in rows else further(*(row if isinstance(row, tuple) else (row,))) for row in table]


def is_further(items: Sequence[pytest.Item]) -> list[bool]:
    """Of each test, in their order, whether `make test` leaves it out."""
    products: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        for name, strength in STRENGTHS.items():
            if item.get_closest_marker(name):
                products.setdefault((item.nodeid.partition("[")[0], strength), []).append(item)
    kept: set[pytest.Item] = set()
    for (_, strength), rows in products.items():
        kept |= {rows[index] for index in covering([_row(item) for item in rows], strength)}
    in_products = {item for rows in products.values() for item in rows}
    return [
        item.get_closest_marker("further") is not None or (item in in_products and item not in kept) for item in items
    ]


def _row(item: Any) -> Row:
    return tuple((name, repr(value)) for name, value in item.callspec.params.items())


def covering(rows: Sequence[Row], strength: int) -> set[int]:
    """Indices of rows in which all `strength` values occur together that do in any: at each turn the row with most new.

    Greedy, so not the fewest; the first of equals, so the same in every process.
    """
    new = [set(combinations(row, min(strength, len(row)))) for row in rows]
    chosen: set[int] = set()
    while any(new):
        best = max(range(len(rows)), key=lambda index: (len(new[index]), -index))
        chosen.add(best)
        seen = new[best]
        new = [each - seen for each in new]
    return chosen

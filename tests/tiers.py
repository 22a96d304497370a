"""Two tiers: without options what a change is likely to break, with `--full` everything.

A question that is asked of rows of the table is asked, without `--full`, of the fewest of them that show
every capability. Marks say what else waits for `--full`, what is asked of every row all the same, and what
is asked of fewer: of one row of each kind, and with `--full` of the fewest that show every capability.
"""

import collections
from collections.abc import Collection, Iterable
from typing import Any

import pytest

FULL = False
"""Whether everything runs; set by `conftest.py`, before any test is imported."""

COUNTS: collections.Counter[str] = collections.Counter()
"""What the running test has counted, for the last lines of the report."""


def cases(count: int) -> int:
    """How many of so many generated cases this tier draws."""
    return count if FULL else count // 10


def count(what: str, number: int = 1) -> None:
    """Adds to a count that the report shows."""
    COUNTS[what] += number


def cover(rows: Iterable[Any], what: str = "capabilities") -> list[Any]:
    """The fewest of these rows, or nearly so, that show all of their capabilities, or all of their kinds."""
    shows = {row: getattr(row, what) for row in rows}
    missing = set().union(*shows.values())
    found = []
    while missing:
        best = max(shows, key=lambda row: len(shows[row] & missing))
        found.append(best)
        missing -= shows[best]
    return found


def later(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`, of which all but those of `now` wait for `--full`."""
    return [pytest.param(value, marks=() if value in now else pytest.mark.full) for value in values]


def some(rows: Iterable[Any]) -> list[Any]:
    """Of these rows, those that a test should take that goes through them itself."""
    return list(rows) if FULL else cover(rows)

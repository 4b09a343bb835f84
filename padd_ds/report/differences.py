"""Settings and facts of several runs or models as tables, a column each."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from padd_ds.report.html import NO_DATA, cut, table
from padd_ds.report.numbers import UNKNOWN

MAX_CELL = 80


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key to value, as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def differing_table(values: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """A row per key whose values differ; absent ones are the defaults."""
    keys = sorted({key for one in values for key in one})
    differing = [key for key in keys if len({one.get(key) for one in values}) > 1]
    if not differing:
        return '<p class="hint">nothing</p>' if keys else NO_DATA
    return _table(values, names, differing)


def listed_table(values: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """A row per key, in the order in which they come up."""
    return _table(values, names, list(dict.fromkeys(key for one in values for key in one)))


def _table(values: Sequence[Mapping[str, str]], names: Sequence[str], keys: Sequence[str]) -> str:
    rows = [[key, *(cut(one.get(key, UNKNOWN), MAX_CELL) for one in values)] for key in keys]
    return table(["", *names], rows, texts=True)

"""Figures as people read them and as JSON keeps them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["axis_labels", "counted", "number", "percent", "significant"]


def number(value: float) -> str:
    """A number as a person reads it: 1,200, 0.25, 3e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:.0e}"


def counted(count: int, one: str, more: str | None = None) -> str:
    """A count and its noun: 1 record, 2,000 records, 0 retries."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def axis_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of an axis as numbers that differ: with the decimals of their step where three digits do not do."""
    texts = [number(tick) for tick in ticks]
    if len({*texts}) == len(texts):
        return texts
    step = min(abs(after - before) for before, after in pairwise(ticks))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{tick:,.{decimals}f}" if decimals <= 15 else repr(tick) for tick in ticks]


def percent(share: float) -> str:
    """A share of one in percent, rounded down: 99.97 % is neither all nor certainty."""
    return "100 %" if share >= 1 else f"{math.floor(share * 1000) / 10:.1f} %"


def significant(value: float) -> float:
    """A rate with the six digits that mean something, however small it is."""
    return float(f"{value:.6g}")

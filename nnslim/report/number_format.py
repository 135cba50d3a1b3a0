"""Numbers as the report writes them; what is unknown becomes a dash."""

from __future__ import annotations

import json
import math
from typing import Any

DASH = "–"


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def count(value: float | None) -> str:
    """1234567 -> "1,234,567"."""
    return DASH if _unknown(value) else f"{value:,.0f}"


def giga(value: float | None) -> str:
    """2744201600 -> "2.744"."""
    return DASH if _unknown(value) else f"{value / 1e9:.3f}"


def dice(value: float | None) -> str:
    """Four decimals."""
    return DASH if _unknown(value) else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A signed percentage: 2.345 -> "+2.35 %"."""
    return DASH if _unknown(value) else f"{value:+.2f} %"


def short(value: float | None) -> str:
    """Three significant digits, without an exponent from 0.001 to 999,999."""
    if _unknown(value):
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    """2.5 -> "2.50x"."""
    return DASH if _unknown(value) else f"{value:.2f}x"


def seconds(value: float | None) -> str:
    """Seconds, or milliseconds below one: 0.181 -> "181 ms"."""
    if _unknown(value):
        return DASH
    return f"{short(value)} s" if value >= 1 else f"{short(value * 1e3)} ms"


def seconds_only(value: float | None) -> str:
    """Seconds without the unit."""
    return DASH if _unknown(value) else f"{value:.3f}"


def as_json(value: Any, indent: int | None = None) -> str:
    """Text of a setting."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


FILTERS = {
    "count": count,
    "giga": giga,
    "dice": dice,
    "percent": percent,
    "short": short,
    "times": times,
    "seconds": seconds,
    "seconds_only": seconds_only,
    "json": as_json,
}

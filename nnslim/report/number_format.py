"""Numbers as the report writes them; an unknown number becomes a dash."""

from __future__ import annotations

from collections.abc import Callable

DASH = "–"


def _known(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: DASH if value is None or value != value else form(value)


count = _known("{:,.0f}".format)  # 1234567 -> "1,234,567"
giga = _known(lambda value: f"{value / 1e9:.3f}")  # 2744201600 -> "2.744"
dice = _known("{:.4f}".format)
percent = _known("{:+.2f} %".format)  # 2.345 -> "+2.35 %"
share = _known("{:.1%}".format)
times = _known("{:.2f}x".format)
# Three significant digits, without an exponent from 0.001 to 999,999.
short = _known(lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}")
seconds = _known(lambda value: f"{short(value)} s" if value >= 1 else f"{short(value * 1e3)} ms")
seconds_only = _known("{:.3f}".format)
megabytes = _known(lambda value: f"{value / 1e6:.2f}")
FILTERS = ("count", "giga", "dice", "percent", "share", "times", "short", "seconds", "seconds_only", "megabytes")

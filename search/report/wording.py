"""How a report words values and differences: rounded by their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Smaller errors are rounding: in the digits that are shown they would be 0.
LEAST = 5e-9


def plus_minus(value: float, error: float | None = None) -> str:
    """``0.842 ± 0.012``: two significant digits of the standard error, or four of the value."""
    digits = _digits(error)
    if digits is None or error is None or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def rounded(value: float, error: float | None, sign: str = "") -> str:
    """A value with as many digits as its standard error deserves, three without one."""
    digits = _digits(error)
    return f"{value:{sign}.3g}" if digits is None else f"{value:{sign}.{digits}f}"


def interval(low: float, high: float, error: float | None) -> str:
    """An interval of a difference, rounded by a standard error."""
    return f"{rounded(low, error, '+')} to {rounded(high, error, '+')}"


def size_of(difference: float, error: float | None) -> str:
    """The size of a difference other than 0, rounded by a standard error but never to 0."""
    text = rounded(abs(difference), error)
    return text if float(text) else f"{abs(difference):.2g}"


def change(improvement: float, error: float | None) -> str:
    """``0.011 better``, ``0.004 worse`` or ``equal``."""
    if improvement == 0:
        return "equal"
    return f"{size_of(improvement, error)} {'better' if improvement > 0 else 'worse'}"


def first_of(names: Sequence[str]) -> str:
    """At most eight names, with dots for the others."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _digits(error: float | None) -> int | None:
    """Digits after the point that a standard error deserves; None without a useful error."""
    if error is None or not math.isfinite(error) or error < LEAST:
        return None
    # Of the error as it is shown: 0.00996 is 0.010.
    return min(max(1 - math.floor(math.log10(float(f"{error:.1e}"))), 0), 8)

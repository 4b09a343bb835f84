"""Numbers as people read them."""

import math

MINUS, TIMES, NO_BREAK_SPACE = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NO-BREAK SPACE}"

UNKNOWN = "-"
"""In place of a number that nobody knows."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def readable(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant ones: 0.0312, 1230, inf; a power of ten only where it is shorter."""
    rounded = float(f"{value:.{digits}g}") + 0.0  # no negative zero
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e6 or not math.isfinite(rounded):
        return f"{rounded:.15g}".replace("-", MINUS)
    mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}{TIMES}{power_of_ten(int(exponent))}".replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """10⁻⁵ for -5."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def scaled(count: float) -> str:
    """A count with a decimal prefix: 134.5M; up to 999 as it is."""
    if not math.isfinite(count):
        return str(count)
    for size, unit in _UNITS:
        # 999,950 would round to 1000.0k: it belongs to the next unit
        if abs(count) >= size * 0.99995:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"

"""Times and amounts, short enough for a table."""

from __future__ import annotations

__all__ = ["amount", "duration"]

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """A time in its two largest units: `3 d 4 h`, `12 min 5 s`."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def amount(number: float) -> str:
    """A number with three digits and a prefix of its unit, which follows: `0 `, `12.3 k`, `4.56 M`."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T" if number < 999.5 else f"{number:.0f} T"

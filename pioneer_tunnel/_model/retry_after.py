"""The header Retry-After of an HTTP answer."""

from __future__ import annotations

__all__ = ["retry_after_seconds"]


def retry_after_seconds(value: str | None) -> float | None:
    """Its seconds; None when it is absent, or a date, which would depend on the server's clock."""
    if value is None or not value.isascii() or not value.isdigit() or len(value) > 9:
        return None
    return float(value)

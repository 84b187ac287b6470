"""The limits of a session: what one peer may take of memory and streams."""

from __future__ import annotations

from typing import Any, final

import attrs

__all__ = ["Limits"]


def _limit(default: int) -> Any:
    def check(_instance: object, field: attrs.Attribute[int], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{field.name} is {value!r}; allowed is a whole number of 0 or more")

    return attrs.field(default=default, validator=check)


@final
@attrs.frozen(kw_only=True)
class Limits:
    """Limits of the memory and the streams of one session.

    Attributes:
        stream_window: the largest receive window of one stream, in bytes (default 16 MiB).
        window_growth: how much all receive windows together may grow beyond 256 KiB each, in bytes (default 32 MiB).
        unread: received data of all streams that the application has not read, in bytes (default 64 MiB).
        unsent: data of all streams that waits to be sent, or was returned by a stream's last read and may still be on
            its way to somewhere else, in bytes (default 16 MiB). One stream holds at most 64 KiB to send without credit
            and 256 KiB with credit, and 256 KiB of its last read. It may hold 4 KiB of each even when the limit is
            used up.
        streams: the number of streams that the peer may have open at a time (default 4096).
        unaccepted: how many of these the application may not have accepted yet (default 256). The same number may be
            opened between two calls of `Session.events`. With 0, every stream that the peer opens is reset.

    Raises:
        ValueError: a limit is not a whole number of 0 or more.
    """

    stream_window: int = _limit(16 * 1024 * 1024)
    window_growth: int = _limit(32 * 1024 * 1024)
    unread: int = _limit(64 * 1024 * 1024)
    unsent: int = _limit(16 * 1024 * 1024)
    streams: int = _limit(4096)
    unaccepted: int = _limit(256)

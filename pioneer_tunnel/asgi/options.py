"""The limits of an ASGI server: how long it waits, and how much it takes."""

from __future__ import annotations

from typing import Any, Final, final

import attrs

__all__ = ["DEFAULTS", "Options"]


def _positive(_instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{field.name} is {value!r}; allowed is a number above 0")


def _seconds(default: float) -> Any:
    return attrs.field(default=default, validator=_positive)


def _bytes(default: int) -> Any:
    return attrs.field(default=default, validator=_positive)


@final
@attrs.frozen(kw_only=True)
class Options:
    """What the ASGI server allows its visitors, and its application.

    Attributes:
        head_timeout: seconds for the head of a request, from its first byte; then the visitor gets 408.
        keep_alive_timeout: seconds that a connection may be idle before its first request, and between two.
        graceful_timeout: seconds that requests and WebSockets under way get to finish when the server stops. Then they
            are cancelled, and their visitors get a reset.
        startup_timeout: seconds for the startup of the application (ASGI's lifespan).
        shutdown_timeout: seconds for its shutdown.
        close_timeout: seconds that a visitor gets to take the closing of a WebSocket, and to answer it.
        max_head_bytes: the largest head of a request; a larger one gets 431.
        max_message_bytes: the largest WebSocket message; a larger one closes the WebSocket with code 1009.

    The body of a request has no limit: it is read as fast as the application asks for it.

    Raises:
        ValueError: a value is no number above 0.
    """

    head_timeout: float = _seconds(10.0)
    keep_alive_timeout: float = _seconds(5.0)
    graceful_timeout: float = _seconds(3.0)
    startup_timeout: float = _seconds(60.0)
    shutdown_timeout: float = _seconds(60.0)
    close_timeout: float = _seconds(5.0)
    max_head_bytes: int = _bytes(64 * 1024)
    max_message_bytes: int = _bytes(16 * 1024 * 1024)


DEFAULTS: Final = Options()

"""What a session has to tell its driver, each thing once and in order.

Neighbours: `session` appends them; `connection` wakes who is concerned.
"""

from __future__ import annotations

from typing import TypeAlias, final

import attrs

from .stream_state import Stream

__all__ = [
    "Event",
    "GoAwayReceived",
    "OpenAllowed",
    "PongReceived",
    "StreamOpened",
    "StreamReadable",
    "StreamWritable",
]


@final
@attrs.frozen
class StreamOpened:
    """The peer opened `stream`. It waits for `Session.acknowledge` or `Session.reset`."""

    stream: Stream


@final
@attrs.frozen
class StreamReadable:
    """`Session.read` has something new to say of `stream`: data, the end, or a reset."""

    stream: Stream


@final
@attrs.frozen
class StreamWritable:
    """`stream` has room for more, or has been flushed, or will never have room again."""

    stream: Stream


@final
@attrs.frozen
class OpenAllowed:
    """A stream of ours was accepted by the peer, or is gone, so there may be room for another one."""


@final
@attrs.frozen
class PongReceived:
    """The peer answered a ping; `round_trip` is in seconds."""

    round_trip: float


@final
@attrs.frozen
class GoAwayReceived:
    """The peer takes no further streams (code 0), or ends the session for the reason `code`."""

    code: int


Event: TypeAlias = StreamOpened | StreamReadable | StreamWritable | OpenAllowed | PongReceived | GoAwayReceived

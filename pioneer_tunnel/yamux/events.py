"""The events that a session reports to its driver, each once and in order."""

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
@attrs.define
class StreamOpened:
    """The peer opened `stream`. It waits for `Session.acknowledge` or `Session.reset`."""

    stream: Stream


@final
@attrs.define
class StreamReadable:
    """`Session.read` of `stream` has something new: data, the end, or a reset."""

    stream: Stream


@final
@attrs.define
class StreamWritable:
    """`stream` may send more, or everything queued was sent, or it was reset."""

    stream: Stream


@final
@attrs.define
class OpenAllowed:
    """The peer acknowledged a stream that we opened, or that stream is closed. So another one may be opened."""


@final
@attrs.define
class PongReceived:
    """The peer answered a ping; `round_trip` is in seconds."""

    round_trip: float


@final
@attrs.define
class GoAwayReceived:
    """The peer accepts no more streams (code 0), or ends the session because of the error `code`."""

    code: int


Event: TypeAlias = StreamOpened | StreamReadable | StreamWritable | OpenAllowed | PongReceived | GoAwayReceived

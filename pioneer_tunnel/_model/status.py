"""What a host application is told: where the tunnel stands, and why.

`Status` is one moment, immutable, with its form on the wire (`to_wire`, `from_wire`). `StatusFeed` is the moments in
order: any number of tasks watch it, none of them can slow the tunnel, and each of them always gets the newest.

Neighbours: the supervisor publishes; `Tunnel.watch` and `RemoteAccess.watch` hand the feed on. Nothing here knows
how a tunnel works.
"""

from __future__ import annotations

import enum
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, final

import attrs
import trio

__all__ = ["ErrorKind", "State", "Status", "StatusFeed", "clean_message"]

MESSAGE_LIMIT: Final = 300
HISTORY_LIMIT: Final = 256


class State(enum.StrEnum):
    """Where the tunnel stands. The values are those of the wire and get no new members, ever."""

    DISABLED = "disabled"
    STARTING = "starting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    STOPPED = "stopped"


class ErrorKind(enum.StrEnum):
    """Why it stands there. The values are those of the wire and get no new members, ever."""

    INVALID_SETTINGS = "invalid_settings"
    MISSING_KEY = "missing_key"
    MISSING_BINARY = "missing_binary"
    LOCAL_GATEWAY_UNAVAILABLE = "local_gateway_unavailable"
    RELAY_RESOLVE_FAILED = "relay_resolve_failed"
    RELAY_CONNECT_FAILED = "relay_connect_failed"
    TUNNEL_AUTH_FAILED = "tunnel_auth_failed"
    PROCESS_EXITED = "process_exited"
    UNSUPPORTED_TRANSPORT = "unsupported_transport"
    RESTART_LIMIT_REACHED = "restart_limit_reached"
    IO = "io"
    UNKNOWN = "unknown"


def clean_message(text: str) -> str:
    """Make `text` fit for a status, a log line and a screen: one line, printable, at most 300 characters.

    Control, format and line-separating characters (Unicode categories C*, Zl, Zp) become spaces, so that nothing a
    relay says can forge a log line or steer a terminal; runs of white space become one space.
    """
    printable = "".join(
        " " if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" else char for char in text
    )
    folded = " ".join(printable.split())
    return folded if len(folded) <= MESSAGE_LIMIT else folded[: MESSAGE_LIMIT - 1] + "…"


def _message(text: str | None) -> str | None:
    """`text` as a status holds it; what says nothing is no message."""
    return None if text is None else clean_message(text) or None


@final
@attrs.frozen(kw_only=True)
class Status:
    """One moment of a tunnel.

    Attributes:
        state: where the tunnel stands.
        error_kind: why, when something is wrong; None otherwise.
        message: for a person; at most 300 characters on one line, without secrets.
        updated_at_unix: wall time, in seconds, of the last change of state, error_kind or message.
        public_url: where visitors reach the gateway, as the relay told; kept while reconnecting.
        attempt: which attempt of this generation this is about, from 1.
        retry_at_unix: wall time, in seconds, of the next attempt; present only while one is planned.
        relay_rtt_ms: the last round trip to the relay, in milliseconds.
    """

    state: State
    error_kind: ErrorKind | None = None
    message: str | None = attrs.field(default=None, converter=_message)
    updated_at_unix: int | None = None
    public_url: str | None = None
    attempt: int | None = None
    retry_at_unix: int | None = None
    relay_rtt_ms: float | None = None

    def says_the_same_as(self, other: Status) -> bool:
        """True when state, error kind and message are equal: what `updated_at_unix` is the time of."""
        return (self.state, self.error_kind, self.message) == (other.state, other.error_kind, other.message)

    def is_news_after(self, other: Status) -> bool:
        """True when a client has to be notified of this after `other`.

        It is for a change of what it says, for a new public URL and for a new time of retry; never for a round trip,
        or because the time of retry has come.
        """
        return (
            not self.says_the_same_as(other)
            or self.public_url != other.public_url
            or (self.retry_at_unix is not None and self.retry_at_unix != other.retry_at_unix)
        )

    def to_wire(self) -> dict[str, Any]:
        """The `STATUS` object of the gateway contract; a field that is None is absent."""
        return {
            field.name: str(value) if isinstance(value, enum.StrEnum) else value
            for field in attrs.fields(Status)
            if (value := getattr(self, field.name)) is not None
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Status:
        """Read a `STATUS` object. Unknown keys are ignored, as a newer gateway may send them.

        Raises:
            ValueError: naming the field, when one has a value that the contract does not allow.
        """
        fields = {field.name: wire[field.name] for field in attrs.fields(Status) if wire.get(field.name) is not None}
        if "state" not in fields:
            raise ValueError("status: 'state' is missing")
        try:
            fields["state"] = State(fields["state"])
        except ValueError:
            raise ValueError(f"status: 'state' is {fields['state']!r}, not one of {[*map(str, State)]}") from None
        if "error_kind" in fields:
            try:
                fields["error_kind"] = ErrorKind(fields["error_kind"])
            except ValueError:
                kinds = [*map(str, ErrorKind)]
                raise ValueError(f"status: 'error_kind' is {fields['error_kind']!r}, not one of {kinds}") from None
        for name, kinds_of in _WIRE_TYPES.items():
            value = fields.get(name)
            if value is not None and (not isinstance(value, kinds_of) or isinstance(value, bool)):
                raise ValueError(
                    f"status: {name!r} is {value!r}, not of type {' or '.join(k.__name__ for k in kinds_of)}"
                )
        return cls(**fields)


_WIRE_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "message": (str,),
    "updated_at_unix": (int,),
    "public_url": (str,),
    "attempt": (int,),
    "retry_at_unix": (int,),
    "relay_rtt_ms": (int, float),
}


@final
class StatusFeed:
    """The newest status, for any number of watchers.

    A watcher that is slower than the tunnel skips what lay between and gets the newest (it conflates); it never
    misses the last one. `publish` is synchronous and costs the same however slow the watchers are. Whoever wants
    every single change reads `history`, which holds the last 256, and `dropped`, which counts those
    before.
    """

    def __init__(self, initial: Status) -> None:
        self._current = initial
        self._sequence = 0
        self._ended = False
        self._changed = trio.Event()
        self._history: deque[Status] = deque([initial], maxlen=HISTORY_LIMIT)
        self._dropped = 0

    @property
    def current(self) -> Status:
        """The newest status."""
        return self._current

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return tuple(self._history)

    @property
    def dropped(self) -> int:
        """How many statuses are older than `history` reaches back."""
        return self._dropped

    def publish(self, status: Status) -> None:
        """Make `status` the newest. One equal to the current changes nothing and wakes nobody."""
        if status == self._current:
            return
        if attrs.evolve(status, relay_rtt_ms=self._current.relay_rtt_ms) == self._current:
            self._history.pop()  # another round trip is no change of its own
        elif len(self._history) == HISTORY_LIMIT:
            self._dropped += 1
        self._history.append(status)
        self._current = status
        self._sequence += 1
        self._wake()

    def end(self) -> None:
        """Let watchers finish once they have seen the newest status. Ending twice is ending once."""
        self._ended = True
        self._wake()

    def resume(self) -> None:
        """Let new watchers wait for changes again, after `end`. Those that had ended stay ended."""
        self._ended = False

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def watch(self) -> AsyncIterator[Status]:
        """The current status at once, then the newest after each change; ends after `end`.

        A plain iterator, not an async generator: it holds a number and nothing that has to be closed.
        """
        return _Watcher(self)


@final
class _Watcher(AsyncIterator[Status]):
    def __init__(self, feed: StatusFeed) -> None:
        self._feed = feed
        self._seen = -1
        self._ended = False

    def __aiter__(self) -> _Watcher:
        return self

    async def __anext__(self) -> Status:
        feed = self._feed
        await trio.lowlevel.checkpoint()
        while self._ended or self._seen == feed._sequence:
            if self._ended or feed._ended:
                self._ended = True  # for good, whatever `resume` does for others
                raise StopAsyncIteration
            # No deadline: a quiet tunnel is a healthy one.
            await feed._changed.wait()
        self._seen = feed._sequence
        return feed._current


def states_of(statuses: Iterable[Status]) -> list[State]:
    """The states alone, each once while it lasts: what a timeline of a tunnel looks like to a person."""
    states: list[State] = []
    for status in statuses:
        if not states or states[-1] is not status.state:
            states.append(status.state)
    return states

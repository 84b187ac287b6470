"""Checks a sequence of statuses against the gateway contract.

It depends on the contract only, so it also checks statuses that a gateway builds itself. A status is a `Status`, or a
mapping in wire form.

    contract = StatusContract()
    for status in recorded:
        contract.see(status)       # raises ContractBroken, with the history, at the first that breaks a rule

It cannot check whether `connected` is true; `StatusRecorder` does.
"""

from __future__ import annotations

import enum
import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import attrs

from .._model.status import ErrorKind, State, Status

__all__ = ["ContractBroken", "StatusContract", "attempt_began"]

MESSAGE_LIMIT: Final = 300


@final
class ContractBroken(AssertionError):
    """A status broke the gateway contract.

    Attributes:
        rule: the broken rule, as text.
        history: all statuses so far in wire form; the last one broke the rule.
    """

    def __init__(self, rule: str, history: tuple[Mapping[str, Any], ...]) -> None:
        self.rule: Final = rule
        self.history: Final = history
        lines = [f"  {number:>4}  {_line(wire)}" for number, wire in enumerate(history, 1)]
        super().__init__("\n".join([rule, "the statuses so far:", *lines]))


class _Phase(enum.Enum):
    """A state, and what came before it in its generation."""

    DISABLED = "disabled"
    STARTING = "starting"
    RETRYING = "failed before the first connect, and retried"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    REJECTED = "rejected after it was up, and retried"
    OVER = "failed for good"
    STOPPED = "stopped"


_ALLOWED_KINDS: Final[Mapping[_Phase, frozenset[ErrorKind | None]]] = {
    _Phase.DISABLED: frozenset({None}),
    _Phase.STARTING: frozenset({None}),
    _Phase.RETRYING: frozenset(
        {
            ErrorKind.RELAY_RESOLVE_FAILED,
            ErrorKind.RELAY_CONNECT_FAILED,
            ErrorKind.PROCESS_EXITED,
            ErrorKind.UNKNOWN,
        }
    ),
    _Phase.CONNECTED: frozenset({None, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE}),
    _Phase.RECONNECTING: frozenset(
        {
            ErrorKind.RELAY_RESOLVE_FAILED,
            ErrorKind.RELAY_CONNECT_FAILED,
            ErrorKind.PROCESS_EXITED,
            ErrorKind.UNKNOWN,
        }
    ),
    _Phase.REJECTED: frozenset({ErrorKind.INVALID_SETTINGS, ErrorKind.TUNNEL_AUTH_FAILED}),
    _Phase.OVER: frozenset(
        {
            ErrorKind.INVALID_SETTINGS,
            ErrorKind.MISSING_KEY,
            ErrorKind.MISSING_BINARY,
            ErrorKind.UNSUPPORTED_TRANSPORT,
            ErrorKind.TUNNEL_AUTH_FAILED,
            ErrorKind.RESTART_LIMIT_REACHED,
            ErrorKind.IO,
        }
    ),
    _Phase.STOPPED: frozenset({None}),
}

_NEW_GENERATION: Final = frozenset({_Phase.STARTING, _Phase.OVER, _Phase.DISABLED, _Phase.STOPPED})
"""Phases that may follow any phase: the settings change, or the host stops the tunnel."""

_FOLLOWERS: Final[Mapping[_Phase, frozenset[_Phase]]] = {
    _Phase.DISABLED: _NEW_GENERATION,
    _Phase.STARTING: _NEW_GENERATION | {_Phase.RETRYING, _Phase.CONNECTED},
    _Phase.RETRYING: _NEW_GENERATION | {_Phase.RETRYING, _Phase.CONNECTED},
    _Phase.CONNECTED: _NEW_GENERATION | {_Phase.CONNECTED, _Phase.RECONNECTING, _Phase.REJECTED},
    _Phase.RECONNECTING: _NEW_GENERATION | {_Phase.CONNECTED, _Phase.RECONNECTING, _Phase.REJECTED},
    _Phase.REJECTED: _NEW_GENERATION | {_Phase.CONNECTED, _Phase.RECONNECTING, _Phase.REJECTED},
    _Phase.OVER: _NEW_GENERATION,
    _Phase.STOPPED: _NEW_GENERATION,
}

_FOUND_WITHOUT_TRYING: Final = frozenset(
    {
        ErrorKind.INVALID_SETTINGS,
        ErrorKind.MISSING_KEY,
        ErrorKind.MISSING_BINARY,
        ErrorKind.UNSUPPORTED_TRANSPORT,
        ErrorKind.IO,
    }
)
"""Final failures that a generation may begin with. The others need an attempt, and so a `starting` before."""

_AT_REST: Final = frozenset({_Phase.DISABLED, _Phase.OVER, _Phase.STOPPED})
_WAITS_TO_RETRY: Final = frozenset({_Phase.RETRYING, _Phase.RECONNECTING, _Phase.REJECTED})


@final
class StatusContract:
    """Checks statuses in order, and raises at the first that breaks the contract.

    Args:
        wall_clock: seconds since 1970. With it, `updated_at_unix` must equal this clock in whole seconds whenever
            state, error_kind or message change; so call `see` at the moment of publication. Without it (default),
            `updated_at_unix` must only not decrease, and not change while those three stay.
        conflated: True if statuses may be missing in between, as for a slow reader of `StatusFeed`. Then transitions
            are not checked (default False).

    A wall clock that is set back while statuses are checked breaks the contract.
    """

    def __init__(self, *, wall_clock: Callable[[], float] | None = None, conflated: bool = False) -> None:
        self._wall_clock: Final = wall_clock
        self._conflated: Final = conflated
        self._history: list[Mapping[str, Any]] = []
        self._last: Status | None = None
        self._last_phase: _Phase | None = None

    @property
    def history(self) -> tuple[Mapping[str, Any], ...]:
        """The statuses so far, in wire form."""
        return tuple(self._history)

    def see(self, status: Status | Mapping[str, Any]) -> None:
        """Check the next status.

        Raises:
            ContractBroken: the status is not allowed, or not allowed after those before.
        """
        wire = status.to_wire() if isinstance(status, Status) else dict(status)
        self._history.append(wire)
        seen = self._read(wire)
        phase = self._phase(seen)
        self._check_alone(seen, phase)
        if self._last is not None and self._last_phase is not None:
            self._check_time(self._last, seen)
            if not self._conflated:
                self._check_transition(self._last, self._last_phase, seen, phase)
        self._last, self._last_phase = seen, phase

    def _phase(self, seen: Status) -> _Phase:
        if seen.state is not State.FAILED:
            return _Phase(str(seen.state))
        if seen.error_kind in _ALLOWED_KINDS[_Phase.RETRYING]:
            return _Phase.RETRYING
        under_way = self._last_phase is _Phase.REJECTED and attempt_began(self._last, seen)
        retried = seen.error_kind in _ALLOWED_KINDS[_Phase.REJECTED] and seen.retry_at_unix is not None
        return _Phase.REJECTED if retried or under_way else _Phase.OVER

    def _read(self, wire: Mapping[str, Any]) -> Status:
        """Parse the wire form, and check what `Status` would clean or drop."""
        for name in sorted(_FIELDS & wire.keys()):
            self._rule(wire[name] is not None and wire[name] != "", f"{name} is empty; it has to be absent then")
        try:
            seen = Status.from_wire(wire)
        except ValueError as error:
            self._rule(False, str(error))
            raise AssertionError from error
        message = wire.get("message", "")
        self._rule(
            len(message) <= MESSAGE_LIMIT, f"the message has {len(message)} characters, more than {MESSAGE_LIMIT}"
        )
        control = next((char for char in message if unicodedata.category(char) == "Cc"), None)
        self._rule(control is None, f"the message has a control character, {control!r}")
        return seen

    def _check_alone(self, seen: Status, phase: _Phase) -> None:
        self._rule(
            seen.error_kind in _ALLOWED_KINDS[phase],
            f"{seen.state} with {_named(seen.error_kind)} is in no row of the contract",
        )
        if seen.error_kind is ErrorKind.RESTART_LIMIT_REACHED:
            self._rule(seen.message is not None, "restart_limit_reached has to tell the last cause")
        if seen.retry_at_unix is not None:
            self._rule(phase in _WAITS_TO_RETRY, f"retry_at_unix, but nothing is retried: the tunnel is {phase.value}")
            self._rule(
                seen.updated_at_unix is None or seen.retry_at_unix >= seen.updated_at_unix,
                "retry_at_unix lies before updated_at_unix",
            )
        self._rule(seen.attempt is None or seen.attempt >= 1, f"attempt is {seen.attempt}; attempts count from 1")
        if phase is _Phase.STARTING:
            self._rule(seen.attempt in {None, 1}, "starting again: while a generation retries it keeps its state")
        if seen.links_wanted is not None:
            up = [link.up for link in seen.links or ()]
            self._rule(
                (len(up), sum(up)) == (seen.links_wanted, seen.links_up), "links_up and links_wanted do not count links"
            )
            self._rule(
                any(up) == (phase is _Phase.CONNECTED) or phase in _AT_REST, f"{phase.value} with {sum(up)} links up"
            )
        if seen.relay_rtt_ms is not None:
            self._rule(
                math.isfinite(seen.relay_rtt_ms) and seen.relay_rtt_ms >= 0,
                f"relay_rtt_ms is {seen.relay_rtt_ms}, which is no time",
            )

    def _check_time(self, last: Status, seen: Status) -> None:
        before, now = last.updated_at_unix, seen.updated_at_unix
        if before is None:
            return
        if now is None:
            self._rule(False, "updated_at_unix was there and is gone")
            return
        self._rule(now >= before, f"updated_at_unix goes back by {before - now} s")
        if self._wall_clock is not None and not seen.says_the_same_as(last):
            should = math.floor(self._wall_clock())
            self._rule(now == should, f"updated_at_unix is {now} for what is said at {should}")
        if not self._conflated and seen.says_the_same_as(last):
            self._rule(now == before, "updated_at_unix moves, though state, error_kind and message stay")

    def _check_transition(self, last: Status, before: _Phase, seen: Status, phase: _Phase) -> None:
        if seen.says_the_same_as(last) and before in _AT_REST:
            self._rule(seen.attempt == last.attempt, f"another attempt, though the tunnel is {before.value}")
            return
        self._rule(phase in _FOLLOWERS[before], f"{phase.value!r} does not follow {before.value!r}")
        if phase is _Phase.OVER and before in _AT_REST:
            self._rule(
                seen.error_kind in _FOUND_WITHOUT_TRYING,
                f"{_named(seen.error_kind)} takes an attempt, and there was none: the tunnel was {before.value!r}",
            )
        if last.attempt is not None and seen.attempt is not None and self._same_generation(before, phase, seen):
            # While one link still makes its first attempt, other ones may have made several.
            following = last.attempt + 1 if seen.links_wanted is None or before is not _Phase.STARTING else math.inf
            self._rule(
                last.attempt <= seen.attempt <= following, f"attempt {seen.attempt} follows attempt {last.attempt}"
            )
            if seen.attempt > last.attempt:
                # A connected gateway makes another attempt when its relay drains.
                may_begin = before in _WAITS_TO_RETRY or phase is before is _Phase.CONNECTED or following == math.inf
                self._rule(may_begin, f"another attempt, though the tunnel is {before.value!r}")

    @staticmethod
    def _same_generation(before: _Phase, phase: _Phase, seen: Status) -> bool:
        """Whether `seen` must belong to the generation of the status before it."""
        if before in _AT_REST or phase in {_Phase.STARTING, _Phase.DISABLED, _Phase.STOPPED}:
            return False
        return phase is not _Phase.OVER or seen.error_kind not in _FOUND_WITHOUT_TRYING

    def _rule(self, kept: bool, rule: str) -> None:
        if not kept:
            raise ContractBroken(rule, self.history)


_FIELDS: Final = frozenset(field.name for field in attrs.fields(Status))


def attempt_began(last: Status | None, seen: Status) -> bool:
    """Whether `seen` only says that the retry that `last` planned has begun."""
    return (
        last is not None
        and last.retry_at_unix is not None
        and seen.retry_at_unix is None
        and (seen.says_the_same_as(last) and (last.attempt is None or seen.attempt == last.attempt + 1))
    )


def _named(kind: ErrorKind | None) -> str:
    return "no error_kind" if kind is None else str(kind)


def _line(wire: Mapping[str, Any]) -> str:
    """One status as one line of text."""
    details = {name: value for name, value in wire.items() if name not in {"state", "error_kind"}}
    kind = f" / {wire['error_kind']}" if "error_kind" in wire else ""
    return f"{wire.get('state')}{kind}  " + " ".join(f"{name}={value!r}" for name, value in details.items())

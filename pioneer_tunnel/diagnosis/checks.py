"""Checks and their outcomes, without I/O.

A step that fails ends the way to the relay: what comes after it is skipped. So the first failure is the cause.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, final

import attrs

from .._model.errors import TunnelError

__all__ = ["Check", "Checks", "CheckFailedError", "Finding", "Name", "Outcome", "exit_status"]


@final
class Name(enum.StrEnum):
    """The checks, in their order."""

    NAMES = "names"
    TCP = "tcp"
    PROXY = "proxy"
    TLS = "tls"
    INTERCEPTION = "interception"
    CAPTIVE_PORTAL = "captive portal"
    UPGRADE = "upgrade"
    CLOCK = "clock"
    PROOF = "proof"
    MTU = "mtu"
    LOCAL_GATEWAY = "local gateway"


@final
class Outcome(enum.StrEnum):
    """What came of a check."""

    OK = "ok"
    WARNING = "warning"
    """It works, and deserves a look. Or what was found proves nothing."""
    FAILED = "failed"
    SKIPPED = "skipped"


@final
@attrs.frozen(kw_only=True)
class Check:
    """A check and its outcome. No text holds a secret.

    Attributes:
        name: what was checked.
        outcome: what came of it.
        detail: what was found.
        cure: what to do about it; None when there is nothing to do, or the detail says so.
        seconds: how long it took.
    """

    name: Name
    outcome: Outcome
    detail: str
    cure: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The check for a machine; docs/diagnose.md has the schema."""
        fields = {"name": str(self.name), "outcome": str(self.outcome), "detail": self.detail, "cure": self.cure}
        return {key: value for key, value in fields.items() if value is not None} | {"seconds": round(self.seconds, 3)}


_STATUSES: Final = {name: 10 + position for position, name in enumerate(Name)}


def exit_status(checks: list[Check]) -> int:
    """0 when no check failed; else the status of the first one that did: 10 for names, 11 for tcp, and so on."""
    return next((_STATUSES[check.name] for check in checks if check.outcome is Outcome.FAILED), 0)


class CheckFailedError(Exception):
    """A check failed, and is reported. The cause is its `TunnelError`, if it had one."""


@final
class Finding:
    """What a check finds, while it runs. Without a word it is ok."""

    def __init__(self) -> None:
        self.outcome = Outcome.OK
        self.detail = ""
        self.cure: str | None = None

    def ok(self, detail: str) -> None:
        """It works."""
        self._set(Outcome.OK, detail, None)

    def warning(self, detail: str, cure: str | None = None) -> None:
        """See `Outcome.WARNING`."""
        self._set(Outcome.WARNING, detail, cure)

    def failed(self, detail: str, cure: str | None = None) -> None:
        """It does not work."""
        self._set(Outcome.FAILED, detail, cure)

    def skipped(self, detail: str) -> None:
        """It was not looked at; `detail` says why."""
        self._set(Outcome.SKIPPED, detail, None)

    def _set(self, outcome: Outcome, detail: str, cure: str | None) -> None:
        self.outcome, self.detail, self.cure = outcome, detail, cure


@final
class Checks:
    """Collects checks in the order of `Name`. Those that are passed over are skipped.

    Args:
        report: gets each check when it is done.
        clock: the time, in seconds.
    """

    def __init__(self, report: Callable[[Check], None], clock: Callable[[], float]) -> None:
        self.done: Final[list[Check]] = []
        self._report: Final = report
        self._clock: Final = clock

    @contextmanager
    def check(self, name: Name, cure: str | None = None, *, started: float | None = None) -> Iterator[Finding]:
        """Run a check: the block says what it found. A `TunnelError` in the block is a failure.

        Args:
            cure: of that failure, if the block has set no better one.
            started: when it began, if that was before the block.

        Raises:
            CheckFailedError: it failed.
        """
        finding, cause = Finding(), None
        started = self._clock() if started is None else started
        try:
            yield finding
        except TunnelError as error:
            finding.failed(str(error), finding.cure or cure)
            cause = error
        self._add(name, finding, self._clock() - started)
        if finding.outcome is Outcome.FAILED:
            raise CheckFailedError(name) from cause

    def skip(self, name: Name, why: str) -> None:
        """Skip a check."""
        finding = Finding()
        finding.skipped(why)
        self._add(name, finding, 0.0)

    def _add(self, name: Name, finding: Finding, seconds: float) -> None:
        self._skip_until(name)
        check = Check(name=name, outcome=finding.outcome, detail=finding.detail, cure=finding.cure, seconds=seconds)
        self.done.append(check)
        self._report(check)

    def _skip_until(self, name: Name) -> None:
        failed = next((check.name for check in reversed(self.done) if check.outcome is Outcome.FAILED), None)
        for passed_over in [*Name][len(self.done) : [*Name].index(name)]:
            self.skip(passed_over, f"needs what failed above: {failed}")

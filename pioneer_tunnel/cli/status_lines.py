"""Statuses as lines on standard error, for a person or for a machine."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Final, final

import attrs
import click

from .._model.errors import TunnelError
from .._model.status import State, Status
from .arguments import with_options_named
from .qr import QrCode

__all__ = ["STATE_COLOURS", "StatusLines", "where_visitors_come_in"]

STATE_COLOURS: Final = {
    State.CONNECTED: "green",
    State.RECONNECTING: "yellow",
    State.STARTING: "yellow",
    State.FAILED: "red",
}


def where_visitors_come_in(status: Status, public_url: str) -> str:
    """Where visitors come in, with each service if there is something to tell apart."""
    services = status.services
    if services is not None and not services:
        return "no visitors come in: the relay has none of the services"
    if services is None and "://*." in public_url:
        return f"no visitors come in: each service has a name of its own in {public_url}, so write NAME=LOCAL"
    named = ", ".join(f"{address} ({name})" for name, address in (services or {}).items() if name)
    others = [link.public_url for link in status.links or () if link.public_url not in {None, public_url}]
    return f"visitors come in at {named or ', '.join(map(str, dict.fromkeys([public_url, *others])))}"


def _is_final(status: Status) -> bool:
    return status.state is State.FAILED and status.retry_at_unix is None


@final
class StatusLines:
    """Prints each status that is news (`Status.is_news_after`), once.

    Args:
        as_json: as JSON, and not for a person.
        of_options: messages name options of the command line, where the library names parameters. False for what is
            configured in a file, whose keys have the names of the parameters.
        qr: prints the public address once more.
        echo: prints a line; by default on standard error.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        of_options: bool = True,
        qr: QrCode | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self._of_options: Final = of_options
        self._echo: Final = functools.partial(click.echo, err=True) if echo is None else echo
        self._qr: Final = qr
        self._as_json: Final = as_json
        self._shown = 0
        self._last: Status | None = None

    def catch_up(self, history: Sequence[Status], dropped: int) -> None:
        """Print what is new since the last call. `dropped` is the number of statuses before `history`."""
        for status in history[max(self._shown - dropped, 0) :]:
            if self._last is not None and _is_final(self._last) and status.state is State.STOPPED:
                continue  # the last line says why it failed
            if self._last is None or status.is_news_after(self._last):
                self._show(status)
            self._last = status
        self._shown = dropped + len(history)

    def skip(self, status: Status) -> None:
        """Take `status`, which comes before all others, as printed."""
        self._last = status

    def restart(self) -> None:
        """What comes next is the history of another tunnel, from its beginning."""
        self._shown = 0

    def show_failure(self, error: TunnelError) -> None:
        """Print a final failure, unless it was printed as a status."""
        if self._last is None or not _is_final(self._last):
            self._show(Status(state=State.FAILED, error_kind=error.kind, message=str(error)))

    def _show(self, status: Status) -> None:
        if status.message and self._of_options:
            status = attrs.evolve(status, message=with_options_named(status.message))
        self._echo(self.line(status))
        if self._qr is not None and status.state is State.CONNECTED:
            address = next(iter((status.services or {}).values()), status.public_url)
            if address is not None and "://*." not in address:
                self._qr.show(address, self._echo)

    def line(self, status: Status) -> str:
        """A status as a line."""
        if self._as_json:
            return json.dumps(status.to_wire())
        words = [click.style(f"{status.state:<12}", fg=STATE_COLOURS.get(status.state))]
        if status.state is State.CONNECTED and status.public_url:
            where = where_visitors_come_in(status, status.public_url)
            words.append(f"{where};" if status.message else where)
        if status.message:
            words.append(status.message)
        if status.links_wanted is not None:
            words.append(f"({status.links_up} of {status.links_wanted} links up)")
        words += [f"(TLS of {host}: {one.message})" for host, one in (status.certificates or {}).items() if one.message]
        if status.retry_at_unix is not None:
            words.append(f"(tried again in {max(status.retry_at_unix - int(time.time()), 0)} s)")
        return " ".join(words)

"""A relay and a gateway as two programs, which is what each tunnel here is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..processes import LOOPBACK, running, wait_until, wait_until_listening
from ..visitors import dial_echo
from ..way import PROCESSES, Way

__all__ = ["pair"]


@contextmanager
def pair(
    folder: Path,
    relay: Sequence[str],
    gateway: Sequence[str],
    *,
    listens: int,
    visitors: int,
    reconnects: bool = False,
    cwd: Path | None = None,
) -> Iterator[Way]:
    """Run both until the end of the `with`, which begins when a visitor gets through.

    Args:
        folder: for the logs, and where they run without `cwd`.
        relay: its command.
        gateway: the same, started after the relay.
        listens: the port at which the relay listens when it is ready for the gateway.
        visitors: the relay's port for visitors.
        reconnects: whether the gateway connects again after a restart of the relay.
        cwd: where they run.
    """
    with running(folder, "relay", relay, cwd=cwd) as first:
        wait_until_listening(listens, first)
        with running(folder, "gateway", gateway, cwd=cwd) as second:
            endpoint = (LOOPBACK, visitors)
            wait_until(lambda: dial_echo(endpoint).close(), first, second)
            yield Way(
                endpoint=endpoint,
                processes=dict(zip(PROCESSES, (first.process, second.process), strict=True)),
                relay=first if reconnects else None,
                control=listens if reconnects else None,
            )

"""Checks of memory: the accounts of yamux sessions against their limits, and counts of live objects of the library.

It finds sessions and objects through the garbage collector, so nothing has to register them.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_AHEAD, SEND_RESERVE
from pioneer_tunnel.yamux.session import Session

__all__ = ["count_objects", "grown", "only_new_objects", "overdrafts", "unfinished"]

_LIBRARY: Final = re.compile(r"pioneer_tunnel(?!\.testing\b)\b")
"""The modules of the library, without its test kit."""


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Hide all objects that exist now from `gc.get_objects`: they are not of this day, and searching is faster."""
    hidden_before = gc.get_freeze_count()  # by pytest: tests/conftest.py
    gc.freeze()
    try:
        yield
    finally:
        if not hidden_before:
            gc.unfreeze()


def overdrafts() -> list[str]:
    """The limits that live yamux sessions exceed, as text."""
    return [f"a session: {problem}" for session in _sessions() for problem in _overdrafts_of(session)]


def unfinished() -> list[str]:
    """Sessions with open streams or buffered bytes. Without visitors there must be none."""
    gc.collect()  # ended sessions keep their buffers until they are collected
    found = []
    for session in _sessions():
        streams, budget = session.live_streams, session._budget.left
        if streams or session.unread or session.sending.held or budget != session.limits.window_growth:
            found.append(
                f"a session: {len(streams)} streams, {session.unread} bytes unread, {session.sending.held} unsent,"
                f" {budget} of {session.limits.window_growth} bytes left to grow by"
            )
    return found


def count_objects() -> Counter[str]:
    """Count the live objects of each class of the library, without the test kit."""
    gc.collect()
    classes = (type(item) for item in gc.get_objects())
    return Counter(
        f"{found.__module__}.{found.__qualname__}" for found in classes if _LIBRARY.match(str(found.__module__))
    )


def grown(before: Counter[str], now: Counter[str], *, by: int) -> list[str]:
    """The classes with more than `by` objects more than before."""
    return [f"{number - before[name]} more of {name}" for name, number in now.items() if number - before[name] > by]


def _sessions() -> Iterator[Session]:
    return (item for item in gc.get_objects() if isinstance(item, Session))


def _overdrafts_of(session: Session) -> Iterator[str]:
    limits, streams = session.limits, session.live_streams
    if session.unread > limits.unread:
        yield f"{session.unread} bytes unread, {limits.unread} are allowed"
    held = sum(sum(map(len, stream.receive_queue)) for stream in streams)
    if session.unread < held:
        yield f"streams hold {held} bytes, the session knows of {session.unread}"
    unsent = sum(min(stream.queued, SEND_AHEAD) + stream.lent for stream in streams)
    if session.sending.held < unsent:
        yield f"streams hold {unsent} bytes for sending, the session knows of {session.sending.held}"
    if unsent > limits.unsent + 2 * SEND_RESERVE * len(streams):
        yield f"{session.sending.held} bytes wait to be sent, {limits.unsent} are allowed"
    grown = sum(max(stream.receive_window.size - INITIAL_WINDOW, 0) for stream in streams)
    if not 0 <= grown <= limits.window_growth - session._budget.left:
        yield f"windows have grown by {grown} bytes, {limits.window_growth - session._budget.left} of it are paid for"
    for stream in streams:
        window = stream.receive_window
        if window.size and (window.owed < 0 or window.credit < 0 or window.unread > window.size):
            yield f"{stream!r} has a window of {window.size}, {window.credit} granted and {window.unread} unread"
    theirs = sum(not stream.opened_here for stream in streams)
    if theirs > limits.streams:
        yield f"{theirs} streams of the peer's, {limits.streams} are allowed"

"""Notices that the relay may be reached on another way now, or again.

    Linux        the kernel's notices about routes, addresses and interfaces, over a netlink socket. They only prompt a
                 look at the ways that packets take (`Ways`), so other interfaces may come and go
    elsewhere    and where a sandbox forbids netlink: the source address of a UDP socket that is connected to the relay,
                 every 5 seconds. That sends nothing
    everywhere   the end of a sleep of the machine, or of a stop of this process (`watch_suspension`)

Without a known address of the relay, the ways to two addresses that no one has stand for the internet.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from ipaddress import ip_address
from typing import Final, NoReturn, Protocol, TypeAlias

import trio

from .._model.log_fields import about
from . import netlink
from .suspension import watch_suspension
from .ways import Way, Ways

__all__ = ["WatchNetwork", "watch_network"]

PAUSE: Final = 2.0
"""Seconds between reports, at least."""

POLL: Final = 5.0
"""Seconds between looks, without netlink."""

_SETTLE: Final = 0.1
"""Seconds to wait for further notices: the kernel sends several for one change."""

_ANYWHERE: Final = ("203.0.113.1", "2001:db8::1")
"""Addresses for documentation."""

_PORT: Final = 443
_READ_SIZE: Final = 64 * 1024
_MOST_DATAGRAMS: Final = 256

_log: Final = logging.getLogger("pioneer_tunnel.network")


class WatchNetwork(Protocol):
    """How to notice changes of the network."""

    async def __call__(self, changed: Callable[[str], object], relay_addresses: Callable[[], Collection[str]]) -> None:
        """Call `changed` with what has happened, each time, until cancelled.

        Args:
            changed: does not wait and does not raise.
            relay_addresses: the IP addresses of the relay that are known now.
        """


async def watch_network(changed: Callable[[str], object], relay_addresses: Callable[[], Collection[str]]) -> NoReturn:
    """The `WatchNetwork` of this system. At most one report in 2 seconds; the last one of several is not left out."""
    pending: list[str] = []
    some = trio.Event()

    def note(what: str) -> None:
        pending.append(what)
        some.set()

    def look(way_to: Callable[[str], Way | None]) -> dict[str, Way | None]:
        return {address: way_to(address) for address in (*relay_addresses(), *_ANYWHERE)}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_ways, look, note)
        nursery.start_soon(watch_suspension, lambda seconds: note(f"resumed after {seconds:.0f} seconds"))
        while True:
            # No deadline: a network may stay as it is for ever.
            await some.wait()
            some = trio.Event()
            what = pending[-1]
            pending.clear()
            changed(what)
            await trio.sleep(PAUSE)


_Look: TypeAlias = Callable[[Callable[[str], Way | None]], dict[str, Way | None]]


async def _watch_ways(look: _Look, note: Callable[[str], object]) -> NoReturn:
    ways = Ways()
    if sys.platform == "linux":
        try:
            with closing(_subscribe()) as notices:
                await _follow(notices, ways, look, note)
        except OSError as error:
            fields = about("no_netlink", reason=error)
            _log.debug("the kernel tells of no changes of the network: %s", error, extra=fields)
    while True:
        if ways.look(look(_source_to)):
            note("the network has changed")
        await trio.sleep(POLL)


def _subscribe() -> socket.socket:
    """A netlink socket for the kernel's notices.

    Raises:
        OSError: netlink is not permitted.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE)
    try:
        opened.setblocking(False)
        opened.bind((0, netlink.GROUPS))
    except BaseException:
        opened.close()
        raise
    return opened


async def _follow(notices: socket.socket, ways: Ways, look: _Look, note: Callable[[str], object]) -> NoReturn:
    ways.look(look(_way_to))
    while True:
        # No deadline: a network may stay as it is for ever.
        await trio.lowlevel.wait_readable(notices)
        await trio.sleep(_SETTLE)
        for notice in _received(notices):
            ways.note(notice.interface, running=notice.running, lost=notice.lost, ipv6=notice.ipv6)
        if ways.look(look(_way_to)):
            note("the network has changed")


def _received(notices: socket.socket) -> Iterator[netlink.Notice]:
    for _ in range(_MOST_DATAGRAMS):
        try:
            yield from netlink.notices_in(notices.recv(_READ_SIZE))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # the kernel has dropped some; the ways show what they led to
                raise


def _way_to(address: str) -> Way | None:
    """The way to an IP address, as the kernel's routing decides it."""
    with closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE)) as asked:
        asked.setblocking(False)
        asked.sendto(netlink.way_request(ip_address(address)), (0, 0))
        return netlink.way_in(asked.recv(_READ_SIZE))  # the kernel answers before the send returns


def _source_to(address: str) -> Way | None:
    """Of the way to an IP address only the source."""
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    try:
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect((address, _PORT))
            return Way(source=str(probe.getsockname()[0]).encode())
    except OSError:
        return None

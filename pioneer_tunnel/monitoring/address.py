"""Where a site for operators listens: a port, or a Unix socket.

No site has a login. So the operator's page is at loopback or a Unix socket alone, and metrics are elsewhere only where
the operator names another address.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import trio

from .._model.addresses import Address, UnixAddress, is_loopback
from .._storage.validation import a_text

__all__ = ["SiteAddress", "local_address", "bound", "listen", "name_of_socket", "remove_socket", "site_address"]

SiteAddress: TypeAlias = Address | UnixAddress

_ALLOWED: Final = 'allowed is a loopback address such as "127.0.0.1:9090", or "unix:/path/to/socket"'


def local_address(value: str | SiteAddress) -> SiteAddress:
    """A converter: the address of a site that is for this host alone.

    Raises:
        ValueError: it can be reached from other hosts, or is no address.
    """
    address = site_address(value)
    if isinstance(address, Address) and not is_loopback(address.host):
        raise ValueError(f"other hosts could reach it there, and it has no login; {_ALLOWED}")
    return address


def site_address(value: str | SiteAddress) -> SiteAddress:
    """A converter: the address of a site that other hosts may reach.

    Raises:
        ValueError: it is no address.
    """
    if isinstance(value, Address | UnixAddress):
        return value
    text = a_text(value, _ALLOWED)
    return UnixAddress.parse(text) if text.startswith("unix:") else Address.parse(text, listening=True)


def name_of_socket(address: SiteAddress) -> str:
    """The name of its socket among those that a process inherits, see `Inherited`."""
    return address.path if isinstance(address, UnixAddress) else str(address)


async def listen(address: SiteAddress, inherited: Sequence[socket.socket] = ()) -> list[trio.SocketListener]:
    """Listen at `address`, or go on listening with the sockets that were `inherited` for it.

    Only the user of this process may connect to a Unix socket that is made here. One without a listener is
    replaced.

    Raises:
        OSError: the system refused; the message names the address.
    """
    if inherited:
        return [trio.SocketListener(trio.socket.from_stdlib_socket(given)) for given in inherited]
    try:
        if isinstance(address, UnixAddress):
            return [_listen_unix(address.path)]
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror or error}") from error


def bound(address: SiteAddress, listeners: Sequence[trio.SocketListener]) -> SiteAddress:
    """`address`, with the port that the system chose where it has port 0."""
    if isinstance(address, UnixAddress) or address.port != 0:
        return address
    return Address(address.host, listeners[0].socket.getsockname()[1])


def remove_socket(address: SiteAddress) -> None:
    """Remove the file of a Unix socket."""
    if isinstance(address, UnixAddress):
        with suppress(FileNotFoundError):
            Path(address.path).unlink()


def _listen_unix(path: str) -> trio.SocketListener:
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a process that hangs accepts no connection
        if probe.connect_ex(path) in {0, errno.EAGAIN}:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if Path(path).exists() and not Path(path).is_socket():
        raise OSError(errno.EEXIST, "there is a file of another kind")
    listener = socket.socket(socket.AF_UNIX)
    made = f"{path}.{os.getpid()}"
    try:
        listener.bind(made)
        Path(made).chmod(0o600)
        listener.listen()
        Path(made).replace(path)  # no one could connect before its mode was set
        return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    except BaseException:
        listener.close()
        with suppress(OSError):
            Path(made).unlink()
        raise

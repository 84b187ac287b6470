"""Who is at the other end of a Unix socket. The kernel says so, so no process can pretend."""

from __future__ import annotations

import socket
import struct
import sys

import trio

from .._model.errors import StorageError

__all__ = ["process_of_peer", "require_unix_sockets", "user_of_peer"]


def require_unix_sockets() -> None:
    """Check that this system has Unix sockets.

    Raises:
        StorageError: it does not.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise StorageError(
            "a running gateway or relay is reached over a Unix socket, and Python has none on this system;"
            " change its files instead, and restart it"
        )


if sys.platform == "linux":
    _CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid

    def user_of_peer(connection: trio.socket.SocketType) -> int:
        """The uid of the process that made or accepted the connection.

        Raises:
            OSError: the kernel cannot tell.
        """
        return process_of_peer(connection)[0]

    def process_of_peer(connection: trio.socket.SocketType) -> tuple[int, int]:
        """The uid and the pid of the process that made the connection, or that listens at its other end.

        Raises:
            OSError: the kernel cannot tell.
        """
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _group = _CREDENTIALS.unpack(found)
        return user, pid

else:

    def user_of_peer(connection: trio.socket.SocketType) -> int:
        """The uid of the process that made or accepted the connection.

        Raises:
            OSError: the kernel cannot tell.
        """
        import ctypes  # noqa: PLC0415  # it takes long to import, and Linux needs none

        # In the C library of macOS and of all BSDs.
        getpeereid = getattr(ctypes.CDLL(None, use_errno=True), "getpeereid", None)
        if getpeereid is None:
            raise OSError("this system cannot tell who connects to a Unix socket")
        user, group = ctypes.c_uint32(), ctypes.c_uint32()
        if getpeereid(connection.fileno(), ctypes.byref(user), ctypes.byref(group)) != 0:
            raise OSError(ctypes.get_errno(), "getpeereid failed")
        return user.value

    def process_of_peer(connection: trio.socket.SocketType) -> tuple[int, int]:  # noqa: ARG001  # as on Linux
        """The uid and the pid of the process that made the connection, or that listens at its other end.

        Raises:
            OSError: the kernel cannot tell.
        """
        raise OSError("this system cannot tell which process connects to a Unix socket")

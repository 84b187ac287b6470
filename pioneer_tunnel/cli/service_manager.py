"""What a command tells systemd, see sd_notify(3): that it is ready, what it does, and that it has not hung."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Final

import trio

__all__ = ["keep_watchdog_quiet", "tell_reloading", "tell_systemd"]

_log: Final = logging.getLogger("pioneer_tunnel.cli")


def tell_systemd(state: str) -> None:
    """Tell the service manager the state of this process. Nothing happens without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path is None:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.setblocking(False)  # a service manager that hangs must not stop us
            notifier.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("the service manager cannot be told %r: %s", state, error)


def tell_reloading() -> None:
    """Tell it that the configuration is read again. `READY=1` ends that."""
    tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


async def keep_watchdog_quiet() -> None:
    """Say that we are alive twice as often as the service manager asks for, until cancelled. Returns if it does not."""
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not period.isdecimal() or int(period) == 0 or process not in {"", str(os.getpid())}:
        return
    while True:
        tell_systemd("WATCHDOG=1")
        await trio.sleep(int(period) / 2_000_000)

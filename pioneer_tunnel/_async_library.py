"""Which async library runs the caller. A call under the wrong one gets an error that names the right module."""

from __future__ import annotations

import sys

import trio

__all__ = ["need_asyncio", "need_trio"]


def need_trio(name: str, instead: str) -> None:
    """Check that Trio runs the caller, as far as another library is known to do so.

    Args:
        name: what was called.
        instead: what a host on asyncio uses.

    Raises:
        RuntimeError: asyncio runs the caller.
    """
    if not _in_trio() and _in_asyncio():
        raise RuntimeError(f"{name} needs Trio, and asyncio is running; under asyncio use {instead}")


def need_asyncio(name: str, instead: str) -> None:
    """Check that asyncio runs the caller.

    Args:
        name: what was called.
        instead: what a host on Trio uses.

    Raises:
        RuntimeError: it does not.
    """
    if _in_trio():
        raise RuntimeError(f"{name} needs asyncio, and Trio is running; under Trio use {instead}")
    if not _in_asyncio():
        raise RuntimeError(
            f"{name} needs asyncio, and no event loop is running; without one use pioneer_tunnel.blocking"
        )


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


def _in_asyncio() -> bool:
    asyncio = sys.modules.get("asyncio")  # never imported: then it does not run either
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

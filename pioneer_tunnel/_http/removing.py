"""Removes headers from a head, and changes no other byte. No I/O."""

from __future__ import annotations

from collections.abc import Collection

from .head import RequestHead

__all__ = ["without_headers"]


def without_headers(head: RequestHead, received: bytes, names: Collection[bytes]) -> bytes:
    """The bytes of a head without the lines of some headers.

    Args:
        head: the parsed head.
        received: its bytes, and maybe more.
        names: of the headers, lower-case.
    """
    written = received[: head.length]
    if not any(name in names for name, _ in head.headers):
        return written
    first, *lines = written.removeprefix(b"\r\n").split(b"\r\n")
    kept = [line for (name, _), line in zip(head.headers, lines, strict=False) if name not in names]
    return b"\r\n".join([first, *kept, b"", b""])

"""Connections that are passed on: the bytes that go beside their descriptors. No I/O.

Both ends are of the same version: `FORMAT` is in the name of the channel, so another version does not find it.

A message is one connection after the other, in the order of the descriptors: a head, texts, and what was received.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from ..._model.addresses import Address
from ..visitors.passing import Passed, Stage

__all__ = ["FORMAT", "MOST_RECEIVED", "encode_passed", "parse_passed"]

FORMAT: Final = 2
"""Of the messages. Each change of them takes another number. Workers of two versions meet while they are replaced."""

MOST_RECEIVED: Final = 96 * 1024
"""Bytes that were read of the connections of a message: of one, the largest request head, and what came with it."""

_HEAD: Final = struct.Struct("!BBHHHI")
_HEAD_SIZE: Final = _HEAD.size
_STAGES: Final = tuple(Stage)
_TLS: Final = (False, True, None)
_TLS_CODES: Final = {tls: code for code, tls in enumerate(_TLS)}
_BETWEEN: Final = "\0"


@lru_cache(maxsize=64)
def _local_address(host: str, port: int) -> Address:
    """One that many connections came to."""
    return Address.of_socket((host, port))


def encode_passed(passed: Passed) -> bytes:
    """A connection in a message, without what was received. That follows it."""
    peer, local = passed.peer, passed.local
    peer_host, peer_port = ("", 0) if peer is None else (peer.host, peer.port)
    local_host, local_port = ("", 0) if local is None else (local.host, local.port)
    texts = f"{peer_host}\0{local_host}\0{passed.tunnel}\0{passed.service}".encode()
    sizes = len(texts), len(passed.received)
    return _HEAD.pack(passed.stage, _TLS_CODES[passed.tls], peer_port, local_port, *sizes) + texts


def parse_passed(message: bytes, descriptors: Sequence[int]) -> tuple[list[Passed], bool]:
    """Read a message that came with descriptors.

    Returns:
        A connection for each descriptor, and whether those were all that the message names.

    Raises:
        ValueError: it is none, or it names fewer.
    """
    found, start, end = [], 0, len(message)
    try:
        for descriptor in descriptors:
            stage, tls, peer_port, local_port, text_size, size = _HEAD.unpack_from(message, start)
            begin = start + _HEAD_SIZE + text_size
            peer_host, local_host, tunnel, service = str(message[start + _HEAD_SIZE : begin], "utf-8").split(_BETWEEN)
            start = begin + size
            if start > end:
                raise ValueError("it is cut")
            found.append(
                Passed(
                    descriptor,
                    _STAGES[stage],
                    Address.of_socket((peer_host, peer_port)) if peer_host else None,
                    _local_address(local_host, local_port) if local_host else None,
                    _TLS[tls],
                    tunnel,
                    service,
                    message[begin:start],
                )
            )
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"no message about connections: {error}") from error
    return found, start == end

"""A connection that is passed on: the bytes that go beside its descriptor. Both ends are the same program. No I/O."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

from ..._model.addresses import Address
from ..visitors.passing import Passed, Stage

__all__ = ["MOST_RECEIVED", "encode_passed", "parse_passed"]

MOST_RECEIVED: Final = 96 * 1024
"""Bytes that were read of a connection: the largest request head, and what came with it."""

_HEAD: Final = struct.Struct("!BBHHH")
_HEAD_SIZE: Final = _HEAD.size
_STAGES: Final = tuple(Stage)
_TLS: Final = (False, True, None)
_BETWEEN: Final = "\0"


@lru_cache(maxsize=64)
def _local_address(host: str, port: int) -> Address:
    """One that many connections came to."""
    return Address.of_socket((host, port))


def encode_passed(passed: Passed) -> bytes:
    """A message without what was received, which follows it."""
    peer, local = passed.peer, passed.local
    peer_host, peer_port = ("", 0) if peer is None else (peer.host, peer.port)
    local_host, local_port = ("", 0) if local is None else (local.host, local.port)
    texts = f"{peer_host}\0{local_host}\0{passed.tunnel}\0{passed.service}".encode()
    return _HEAD.pack(passed.stage, _TLS.index(passed.tls), peer_port, local_port, len(texts)) + texts


def parse_passed(message: bytes, descriptor: int) -> Passed:
    """Read a message that came with a descriptor.

    Raises:
        ValueError: it is none.
    """
    try:
        stage, tls, peer_port, local_port, size = _HEAD.unpack_from(message)
        end = _HEAD_SIZE + size
        peer_host, local_host, tunnel, service = str(message[_HEAD_SIZE:end], "utf-8").split(_BETWEEN)
        return Passed(
            descriptor,
            _STAGES[stage],
            Address.of_socket((peer_host, peer_port)) if peer_host else None,
            _local_address(local_host, local_port) if local_host else None,
            _TLS[tls],
            tunnel,
            service,
            message[end:],
        )
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"no message about a connection: {error}") from error

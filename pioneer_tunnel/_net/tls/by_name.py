"""Certificates that are chosen by the name in a visitor's ClientHello, before the handshake."""

from __future__ import annotations

import ssl
from typing import Final, Protocol

import trio

from ..closing import close_after_answer
from .certificate import Certificate
from .client_hello import Alert, BadClientHello, ClientHello, ClientHelloReader
from .stream import TlsStream

__all__ = ["ACME_TLS", "Certificates", "answer_challenge", "context_for", "is_challenge", "read_hello"]

ACME_TLS: Final = b"acme-tls/1"
"""The protocol that only an ACME authority names (RFC 8737)."""

_READ_SIZE: Final = 2 * 1024
"""Bytes that are parsed before other tasks run. They may be 340 records of one byte each."""


class Certificates(Protocol):
    """Certificates by name, and what an ACME authority is to see."""

    async def context_of(self, name: str | None) -> ssl.SSLContext | None:
        """The context for a visitor who asks for `name`; None if there is no certificate for it."""

    def challenge_context(self, name: str | None) -> ssl.SSLContext | None:
        """The context for an authority that looks at `name`; None if it has nothing to see."""


async def read_hello(stream: trio.abc.Stream) -> tuple[ClientHello, bytes]:
    """Read a ClientHello from a new connection. The caller sets the deadline.

    Returns:
        The ClientHello, and all bytes that were read.

    Raises:
        BadClientHello: with the alert to send.
        trio.BrokenResourceError: the connection broke or ended.
    """
    reader = ClientHelloReader()
    while data := await stream.receive_some(_READ_SIZE):
        hello = reader.feed(data)
        if hello is not None:
            return hello, reader.received
    raise trio.BrokenResourceError("the connection ended before its TLS began")


def is_challenge(hello: ClientHello) -> bool:
    """Whether an ACME authority says it."""
    return hello.alpn == (ACME_TLS,)


async def context_for(hello: ClientHello, certificates: Certificate | Certificates) -> ssl.SSLContext:
    """The context for a visitor.

    Raises:
        BadClientHello: with the alert to send, since there is no certificate for the name.
    """
    if isinstance(certificates, Certificate):
        return await certificates.context()
    context = await certificates.context_of(hello.server_name)
    if context is None:
        raise BadClientHello(Alert.UNRECOGNIZED_NAME, "there is no certificate for the name that it asks for")
    return context


async def answer_challenge(stream: trio.abc.Stream, hello: ClientHello, certificates: Certificates) -> None:
    """Let an ACME authority see what it looks for, and close. The caller sets the deadline.

    Args:
        stream: begins with its ClientHello.

    Raises:
        BadClientHello: with the alert to send, since there is nothing to see.
        trio.BrokenResourceError: the handshake failed, or the connection broke.
    """
    context = certificates.challenge_context(hello.server_name)
    if context is None:
        raise BadClientHello(Alert.UNRECOGNIZED_NAME, "no order is under way for the name that it asks for")
    secured = TlsStream(stream, context, server_side=True, https=True)
    await secured.do_handshake()
    await close_after_answer(secured)

"""A visitor's connection, as the modules that serve it pass it on to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import attrs

from ..._model.addresses import Address
from ..._model.callbacks import nothing
from ..._net.adopted import adopt
from ..._net.prefixed_stream import PrefixedStream
from ..._net.streams import ByteStream
from ..connection import Connection

__all__ = ["Visit"]


@final
@attrs.frozen(kw_only=True)
class Visit:
    """A visitor's connection.

    Attributes:
        stream: the connection, in clear.
        visitor: the visitor's address; None where it is unknown.
        local: the relay's address that the visitor connected to; None where it is unknown.
        tls: whether the visitor came over TLS; None where only a balancer in front knows, and does not say.
        source: the visitor's address as limits count it; None when it is exempt from limits per address.
        settle: called when the tunnel is known; raises `OverLimit` when there are too many visitors. By default nothing
            limits them.
        connection: what the exchange keeps when it goes on without a task; None if the task has to stay.
        in_clear: whether it came to an address that sends visitors to https://.
    """

    stream: ByteStream = attrs.field(converter=adopt)
    visitor: Address | None
    local: Address | None
    tls: bool | None
    source: str | None = None
    settle: Callable[[], None] = nothing
    connection: Connection | None = None
    in_clear: bool = False

    @classmethod
    def of(cls, connection: Connection, tls: bool | None = False) -> Visit:  # as the attribute
        """The visit of a new connection, from which nothing was read."""
        return cls(
            stream=connection.stream,
            visitor=connection.peer,
            local=connection.local,
            tls=tls,
            source=connection.arrival.source,
            settle=connection.arrival.settle_as_visitor,
            connection=connection,
        )

    @property
    def is_bare(self) -> bool:
        """Whether the stream is the connection itself, and nothing that was read of it waits."""
        stream = self.stream
        while isinstance(stream, PrefixedStream) and not stream.prefixed:
            stream = stream.transport_stream
        return self.connection is not None and stream is self.connection.stream

    @property
    def host(self) -> str | None:
        """The visitor's IP address; None where it is unknown."""
        return None if self.visitor is None else self.visitor.host

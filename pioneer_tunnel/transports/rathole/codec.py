"""The Pioneer Relay / rathole protocol, version 1, without I/O: bytes in, events out, the whole protocol as a table.

Every message has a fixed size and no length, all integers are little-endian, an enumeration is a u32:

    hello     37   u32 kind (0 control channel, 1 data channel), u8 version = 1, 32 bytes
    auth      32   the proof
    ack        4   0 ok, 1 service does not exist, 2 authentication failed
    command    4   on a control channel: 0 open a data channel, 1 heartbeat
                   on a data channel:    0 start forwarding TCP, 1 start forwarding UDP

A gateway's control channel goes through these states (`_ControlState`), a data channel through the last alone:

    state        the relay may send               and then
    GREETING     hello(control, nonce)            CHALLENGED
    CHALLENGED   ack 1, before any proof          CLOSED      a relay that finds tunnels by name says so at once
    PROVED       ack 0                            OPEN
    PROVED       ack 1, ack 2                     CLOSED
    OPEN         commands                         OPEN

CHALLENGED becomes PROVED when our side takes the proof (`prove`). Anything else is a `RemoteProtocolError`, as early
as the bytes show it, and the channel takes no more.

Neighbours: `key_mode` makes the digests; `pioneer_relay` does the I/O; the scripted relay of `testing` speaks the other
end with the same messages.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, TypeAlias, TypeVar, final

import attrs

from ..._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "ACK_SIZE",
    "COMMAND_SIZE",
    "DIGEST_SIZE",
    "HELLO_SIZE",
    "Ack",
    "Challenge",
    "ChannelKind",
    "ControlChannel",
    "ControlCommand",
    "ControlEvent",
    "DataCommand",
    "Hello",
    "OtherVersionError",
    "decode_data_command",
    "encode_ack",
    "encode_command",
]

VERSION: Final = 1
DIGEST_SIZE: Final = 32
HELLO_SIZE: Final = 37
ACK_SIZE: Final = 4
COMMAND_SIZE: Final = 4

_U32: Final = struct.Struct("<I")
_HELLO_HEAD: Final = struct.Struct("<IB")

_Word = TypeVar("_Word", bound=enum.IntEnum)


@final
class OtherVersionError(RemoteProtocolError):
    """The other end speaks another version of this protocol.

    Attributes:
        version: which.
    """

    def __init__(self, version: int) -> None:
        super().__init__(f"it speaks version {version} of the protocol, and we speak version {VERSION}")
        self.version: Final = version


@final
class ChannelKind(enum.IntEnum):
    """What a connection is for."""

    CONTROL = 0
    DATA = 1


@final
class Ack(enum.IntEnum):
    """What the relay makes of a gateway."""

    OK = 0
    SERVICE_NOT_EXIST = 1
    AUTH_FAILED = 2


@final
class ControlCommand(enum.IntEnum):
    """What the relay asks for on a control channel."""

    CREATE_DATA_CHANNEL = 0
    HEARTBEAT = 1


@final
class DataCommand(enum.IntEnum):
    """What a data channel turns into."""

    START_FORWARD_TCP = 0
    START_FORWARD_UDP = 1


@final
@attrs.frozen
class Hello:
    """The first message of either end.

    Attributes:
        kind: what the connection is for.
        digest: on a control channel the gateway's ID, or the relay's nonce; on a data channel the session.
    """

    kind: ChannelKind
    digest: bytes = attrs.field(repr=False)

    def encode(self) -> bytes:
        """The message."""
        if len(self.digest) != DIGEST_SIZE:
            raise LocalProtocolError(f"a digest has {DIGEST_SIZE} bytes, not {len(self.digest)}")
        return _HELLO_HEAD.pack(self.kind, VERSION) + self.digest

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Hello | None:
        """Read the message that `data` begins with; None while it is not complete.

        Raises:
            OtherVersionError: it is a hello of another version.
            RemoteProtocolError: it is no hello, which shows at its fourth byte at the latest.
        """
        # Both kinds have three zeros behind their first byte. Junk shows before it has come whole: a TLS alert has
        # seven bytes, and nothing follows it.
        if data[:1] > b"\x01" or data[1:4].strip(b"\0"):
            raise RemoteProtocolError(f"it does not begin with a hello of this protocol, but with {_shown(data)}")
        if len(data) < _HELLO_HEAD.size:
            return None
        kind, version = _HELLO_HEAD.unpack_from(data)
        if version != VERSION:
            raise OtherVersionError(version)
        if len(data) < HELLO_SIZE:
            return None
        return cls(ChannelKind(kind), bytes(data[_HELLO_HEAD.size : HELLO_SIZE]))


def encode_ack(ack: Ack) -> bytes:
    """The message."""
    return _U32.pack(ack)


def encode_command(command: ControlCommand | DataCommand) -> bytes:
    """The message."""
    return _U32.pack(command)


def decode_data_command(data: bytes) -> DataCommand:
    """Read the 4 bytes that come on a data channel before it turns into the visitor's connection.

    Raises:
        RemoteProtocolError: nobody knows the command.
    """
    return _decode(DataCommand, data, "a data channel's command")


def _decode(words: type[_Word], data: bytes | bytearray, what: str) -> _Word:
    (number,) = _U32.unpack(data)
    try:
        return words(number)
    except ValueError:
        raise RemoteProtocolError(f"{number} is not known as {what}") from None


@final
@attrs.frozen
class Challenge:
    """The relay wants a proof made with this nonce."""

    nonce: bytes


ControlEvent: TypeAlias = Challenge | Ack | ControlCommand
"""What a relay says on a control channel."""


@final
class _ControlState(enum.Enum):
    GREETING = enum.auto()
    CHALLENGED = enum.auto()
    PROVED = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


_AFTER_ACK: Final[dict[tuple[_ControlState, Ack], _ControlState]] = {
    (_ControlState.CHALLENGED, Ack.SERVICE_NOT_EXIST): _ControlState.CLOSED,
    (_ControlState.PROVED, Ack.OK): _ControlState.OPEN,
    (_ControlState.PROVED, Ack.SERVICE_NOT_EXIST): _ControlState.CLOSED,
    (_ControlState.PROVED, Ack.AUTH_FAILED): _ControlState.CLOSED,
}


@final
class ControlChannel:
    """A gateway's end of a control channel.

    Send `hello` first; feed what comes to `receive`; when it yields a `Challenge`, send what `prove` returns.

    Args:
        id: what the gateway names itself by.
    """

    def __init__(self, id: bytes) -> None:  # noqa: A002  # the protocol's word
        self.hello: Final = Hello(ChannelKind.CONTROL, id).encode()
        self._received = bytearray()
        self._state = _ControlState.GREETING

    @property
    def waits_for(self) -> str:
        """What the relay is to say next, for an error that tells that it did not."""
        return {
            _ControlState.GREETING: "its hello",
            _ControlState.CHALLENGED: "our proof",
            _ControlState.PROVED: "its word on our key",
            _ControlState.OPEN: "a command",
            _ControlState.CLOSED: "nothing",
        }[self._state]

    def prove(self, proof: bytes) -> bytes:
        """The message that answers the challenge."""
        if self._state is not _ControlState.CHALLENGED or len(proof) != DIGEST_SIZE:
            raise LocalProtocolError(f"a proof of {DIGEST_SIZE} bytes is sent once, after the challenge")
        self._state = _ControlState.PROVED
        return proof

    def receive(self, data: bytes | bytearray) -> list[ControlEvent]:
        """Take bytes from the relay, cut anyhow, and return what they say.

        Raises:
            OtherVersionError: the relay speaks another version.
            RemoteProtocolError: it broke a rule. The channel takes no more.
        """
        self._received += data
        events: list[ControlEvent] = []
        try:
            while (event := self._next()) is not None:
                events.append(event)
        except RemoteProtocolError:
            self._state = _ControlState.CLOSED
            raise
        return events

    def _next(self) -> ControlEvent | None:
        match self._state:
            case _ControlState.GREETING:
                hello = Hello.decode(self._received)
                if hello is None:
                    return None
                if hello.kind is not ChannelKind.CONTROL:
                    raise RemoteProtocolError("it answered a control channel with the hello of a data channel")
                del self._received[:HELLO_SIZE]
                self._state = _ControlState.CHALLENGED
                return Challenge(hello.digest)
            case _ControlState.CHALLENGED | _ControlState.PROVED:
                message = self._take(ACK_SIZE)
                if message is None:
                    return None
                ack = _decode(Ack, message, "an answer to a proof")
                after = _AFTER_ACK.get((self._state, ack))
                if after is None:
                    raise RemoteProtocolError(f"it answered {ack.name} before it had our proof")
                self._state = after
                return ack
            case _ControlState.OPEN:
                message = self._take(COMMAND_SIZE)
                return None if message is None else _decode(ControlCommand, message, "a control channel's command")
        self._received.clear()  # CLOSED: what still comes has no meaning
        return None

    def _take(self, size: int) -> bytearray | None:
        if len(self._received) < size:
            return None
        message = self._received[:size]
        del self._received[:size]
        return message


def _shown(data: bytes | bytearray) -> str:
    """What came instead, for who has dialled something else: short, and harmless in a log."""
    if data[:5] == b"HTTP/" or data[:1] == b"<":
        return "what looks like HTTP; an address of that kind is written as a ws:// or wss:// URL"
    if data[:1] == b"\x15" or data[:1] == b"\x16":
        return "what looks like TLS; the transport for that is tls"
    return bytes(data[:8]).hex(" ")

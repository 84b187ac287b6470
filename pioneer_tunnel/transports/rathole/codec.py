"""The Pioneer Relay / rathole protocol, version 1, without I/O.

Every message has a fixed size and no length, all integers are little-endian, an enumeration is a u32:

    hello     37   u32 kind (0 control channel, 1 data channel), u8 version = 1, 32 bytes
    auth      32   the proof
    ack        4   0 ok, 1 service does not exist, 2 authentication failed
    command    4   on a control channel: 0 open a data channel, 1 heartbeat
                   on a data channel:    0 start forwarding TCP, 1 start forwarding UDP

A gateway's control channel has these states (`_ControlState`). A data channel has no state: it gets one command.

    state        the relay may send               and then
    GREETING     hello(control, nonce)            CHALLENGED
    CHALLENGED   ack 1, before any proof          CLOSED      a relay that finds tunnels by name says so at once
    PROVED       ack 0                            OPEN
    PROVED       ack 1, ack 2                     CLOSED
    OPEN         commands                         OPEN

CHALLENGED becomes PROVED when this side makes the proof (`prove`). Everything else is a `RemoteProtocolError`, raised
as soon as the bytes show it. After it the channel accepts nothing.

The scripted relay of `testing` speaks the other side with the same messages.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, TypeAlias, TypeVar, final

import attrs

from ..._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
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
    """The peer speaks another version of this protocol.

    Attributes:
        version: its version.
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
    """The relay's answer to the opening of a gateway."""

    OK = 0
    SERVICE_NOT_EXIST = 1
    AUTH_FAILED = 2


@final
class ControlCommand(enum.IntEnum):
    """A command of the relay on a control channel."""

    CREATE_DATA_CHANNEL = 0
    HEARTBEAT = 1


@final
class DataCommand(enum.IntEnum):
    """A command of the relay on a data channel: what to forward."""

    START_FORWARD_TCP = 0
    START_FORWARD_UDP = 1


@final
@attrs.frozen
class Hello:
    """The first message of both sides.

    Attributes:
        kind: what the connection is for.
        digest: on a control channel the gateway's ID, or the relay's nonce; on a data channel the session.
    """

    kind: ChannelKind
    digest: bytes = attrs.field(repr=False)

    def encode(self) -> bytes:
        """The bytes of the message."""
        if len(self.digest) != DIGEST_SIZE:
            raise LocalProtocolError(f"a digest has {DIGEST_SIZE} bytes, not {len(self.digest)}")
        return _HELLO_HEAD.pack(self.kind, VERSION) + self.digest

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Hello | None:
        """Read the message that `data` begins with; None while it is not complete.

        Raises:
            OtherVersionError: it is a hello of another version.
            RemoteProtocolError: it is no hello. That shows at the fourth byte at the latest.
        """
        # Three zeros follow the first byte of both kinds. Check them before the message is complete: another protocol
        # may send less than a hello and then wait (a TLS alert has seven bytes).
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
    """The bytes of an ack."""
    return _U32.pack(ack)


def encode_command(command: ControlCommand | DataCommand) -> bytes:
    """The bytes of a command."""
    return _U32.pack(command)


def decode_data_command(data: bytes) -> DataCommand:
    """Read the 4 bytes that come on a data channel before it becomes the visitor's connection.

    Raises:
        RemoteProtocolError: the command is unknown.
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
    """The relay asks for a proof with this nonce."""

    nonce: bytes


ControlEvent: TypeAlias = Challenge | Ack | ControlCommand
"""What a relay sends on a control channel."""


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
    """A gateway's side of a control channel.

    Send `hello` first. Pass what comes to `receive`. When that returns a `Challenge`, send what `prove` returns.

    Args:
        id: the ID of the gateway, see `KeyMode.id`.
    """

    def __init__(self, id: bytes) -> None:  # noqa: A002  # the protocol's word
        self.hello: Final = Hello(ChannelKind.CONTROL, id).encode()
        self._received = bytearray()
        self._state = _ControlState.GREETING

    @property
    def waits_for(self) -> str:
        """What the relay has to send next, for an error when it does not."""
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
        """Take bytes from the relay, in pieces of any size, and return the events that they complete.

        Raises:
            OtherVersionError: the relay speaks another version.
            RemoteProtocolError: it broke a rule. The channel accepts nothing after that.
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
        self._received.clear()  # CLOSED: ignore what still comes
        return None

    def _take(self, size: int) -> bytearray | None:
        if len(self._received) < size:
            return None
        message = self._received[:size]
        del self._received[:size]
        return message


def _shown(data: bytes | bytearray) -> str:
    """The unexpected bytes, for an error: short, printable, with a hint when they look like another protocol."""
    if data[:5] == b"HTTP/" or data[:1] == b"<":
        return "what looks like HTTP; an address of that kind is written as a ws:// or wss:// URL"
    if data[:1] == b"\x15" or data[:1] == b"\x16":
        return "what looks like TLS; the transport for that is tls"
    return bytes(data[:8]).hex(" ")

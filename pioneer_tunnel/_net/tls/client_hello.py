"""Reads the ClientHello of a visitor, strictly and within bounds, and never rewrites it. Sans-I/O.

`ClientHelloReader` takes bytes in any pieces and reports the requested server name (RFC 6066, SNI) and the offered
protocols (RFC 7301, ALPN). By the name the relay finds a tunnel whose TLS it does not terminate, and forwards the same
bytes; the gateway parses them again. So anything that two parsers could understand differently is refused with the TLS
alert for it. Rules, checked in the order of the bytes, so that the result does not depend on the pieces:

    1. records of type handshake and version 3.x, none empty, none over 2^14 bytes (RFC 8446, 5.1); a record is parsed
       when it is complete
    2. one ClientHello in them, in any number of records, and nothing after it in the last record
    3. its fields, complete and with no byte left over; each extension at most once, and at most 128 of them
    4. in the extension server_name exactly one name, of type host_name
    5. in the extension ALPN at least one protocol, none empty

Versions, cipher suites and GREASE values (RFC 8701) are left to the server that terminates TLS. With Encrypted Client
Hello the name is that of the outer hello, which is meant for routing. Each byte is read a fixed number of times,
whether the bytes come at once or one by one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, final

import attrs

from ..._model.addresses import is_ip_address, normal_host
from ..._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Alert", "BadClientHello", "ClientHello", "ClientHelloReader", "looks_like_tls"]

MAX_HELLO: Final = 32 * 1024
"""Bytes of a ClientHello with its record headers: ten times the size with post-quantum key shares."""

MAX_EXTENSIONS: Final = 128
"""Extensions of a ClientHello: three times what clients send. Each costs microseconds, and 8000 would fit."""

_HANDSHAKE: Final = 0x16
_ALERT: Final = 0x15
_FATAL: Final = 2
_MAJOR: Final = 3
_RECORD_HEADER: Final = 5
_MAX_RECORD: Final = 2**14
_CLIENT_HELLO: Final = 1
_MESSAGE_HEADER: Final = 4
_RANDOM: Final = 32
_MAX_SESSION_ID: Final = 32
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0
_ALPN: Final = 16


@final
class Alert(enum.IntEnum):
    """The fatal TLS alerts (RFC 8446, 6.2) that a relay sends."""

    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    INTERNAL_ERROR = 80
    MISSING_EXTENSION = 109
    UNRECOGNIZED_NAME = 112

    @property
    def record(self) -> bytes:
        """The whole record, unencrypted since there are no keys yet. The connection is closed after it."""
        return bytes([_ALERT, 3, 3, 0, 2, _FATAL, self])


@final
class BadClientHello(RemoteProtocolError):
    """The bytes are not a ClientHello that can be routed.

    Attributes:
        alert: to be sent.
    """

    def __init__(self, alert: Alert, reason: str) -> None:
        super().__init__(reason)
        self.alert: Final = alert


@final
@attrs.frozen
class ClientHello:
    """What a relay needs to know of a ClientHello. The reader holds the bytes.

    Attributes:
        server_name: the requested host, as `addresses.normal_host` writes it. None if there is none, or if it is an IP
            address, which SNI does not allow but some clients send.
        alpn: the protocols that the client offers (RFC 7301), in its order; empty if it offers none. An ACME server
            that validates by TLS-ALPN-01 offers `acme-tls/1` alone.
    """

    server_name: str | None
    alpn: tuple[bytes, ...] = ()


def looks_like_tls(first: bytes | bytearray) -> bool:
    """Whether a connection that begins with `first` may be TLS. No HTTP request begins like that."""
    return first[:1] == bytes([_HANDSHAKE])


@final
class ClientHelloReader:
    """Reads one ClientHello, from bytes in any pieces.

    Call `feed` until it returns a hello or raises; `received` is all that was fed, to be forwarded. It holds at most
    `MAX_HELLO` bytes and one piece. The caller sets the deadline and notices EOF.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._message = bytearray()
        # Offset of the first incomplete record.
        self._start = 0
        self._finished = False

    @property
    def received(self) -> bytes:
        """All bytes that were fed: the hello, and what came after it."""
        return bytes(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> ClientHello | None:
        """Take the next bytes; return the hello once it is complete, None while it is not.

        Raises:
            BadClientHello: it cannot be routed, whatever follows; send the alert and close.
            LocalProtocolError: the reader has returned a hello, or raised, before.
        """
        if self._finished:
            raise LocalProtocolError("a ClientHelloReader reads one hello; make another for the next connection")
        self._buffer += data
        self._finished = True  # also when this raises
        hello = self._read_records()
        self._finished = hello is not None
        return hello

    def _read_records(self) -> ClientHello | None:
        buffer = self._buffer
        while True:
            start = self._start
            if len(buffer) > start and buffer[start] != _HANDSHAKE:
                raise BadClientHello(Alert.UNEXPECTED_MESSAGE, "a ClientHello comes in records of type handshake")
            if len(buffer) > start + 1 and buffer[start + 1] != _MAJOR:
                raise BadClientHello(Alert.PROTOCOL_VERSION, f"TLS has version 3.x, not {buffer[start + 1]}.x")
            if len(buffer) < start + _RECORD_HEADER:
                return None
            size = int.from_bytes(buffer[start + 3 : start + _RECORD_HEADER])
            if not size:
                raise BadClientHello(Alert.UNEXPECTED_MESSAGE, "a record of the ClientHello is empty")
            if size > _MAX_RECORD:
                raise BadClientHello(
                    Alert.RECORD_OVERFLOW, f"a record has {size} bytes; at most {_MAX_RECORD} are taken"
                )
            end = start + _RECORD_HEADER + size
            if end > MAX_HELLO:
                raise _too_large()
            if len(buffer) < end:
                return None
            self._message += buffer[start + _RECORD_HEADER : end]
            self._start = end
            hello = self._read_message()
            if hello is not None:
                return hello

    def _read_message(self) -> ClientHello | None:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            raise BadClientHello(
                Alert.UNEXPECTED_MESSAGE, f"a handshake begins with a ClientHello, not type {message[0]}"
            )
        if len(message) < _MESSAGE_HEADER:
            return None
        end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
        if end > MAX_HELLO:
            raise _too_large()
        if len(message) < end:
            return None
        if len(message) > end:
            raise BadClientHello(Alert.UNEXPECTED_MESSAGE, "something follows the ClientHello in its record")
        return _client_hello(_Fields(message[_MESSAGE_HEADER:]))


def _too_large() -> BadClientHello:
    return BadClientHello(Alert.ILLEGAL_PARAMETER, f"the ClientHello takes more than {MAX_HELLO} bytes")


@final
class _Fields:
    """Reads the fields of a structure in order."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data: Final = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise BadClientHello(Alert.DECODE_ERROR, "a field of the ClientHello overruns what it stands in")
        self._position += size
        return bytes(self._data[self._position - size : self._position])

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int, *, least: int = 0) -> _Fields:
        """The vector after a length field of `size` bytes."""
        data = self.take(self.number(size))
        if len(data) < least:
            raise BadClientHello(Alert.DECODE_ERROR, "a field of the ClientHello is shorter than it can be")
        return _Fields(data)

    def end(self) -> None:
        if self.left:
            raise BadClientHello(Alert.DECODE_ERROR, "the ClientHello has bytes where it should have ended")


def _client_hello(hello: _Fields) -> ClientHello:
    if hello.number(1) != _MAJOR:
        raise BadClientHello(Alert.PROTOCOL_VERSION, "the ClientHello is of another version than 3.x")
    hello.take(1 + _RANDOM)
    if hello.vector(1).left > _MAX_SESSION_ID:
        raise BadClientHello(Alert.DECODE_ERROR, f"the session id has more than {_MAX_SESSION_ID} bytes")
    if hello.vector(2, least=2).left % 2:
        raise BadClientHello(Alert.DECODE_ERROR, "the cipher suites take an odd number of bytes")
    hello.vector(1, least=1)  # compression methods
    if not hello.left:
        return ClientHello(None)  # no extensions, as old versions of TLS allow
    extensions = hello.vector(2)
    hello.end()
    seen: set[int] = set()
    name: str | None = None
    alpn: tuple[bytes, ...] = ()
    while extensions.left:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind in seen:
            raise BadClientHello(Alert.ILLEGAL_PARAMETER, f"the extension {kind} is given twice")
        seen.add(kind)
        if len(seen) > MAX_EXTENSIONS:
            raise BadClientHello(Alert.ILLEGAL_PARAMETER, f"there are more than {MAX_EXTENSIONS} extensions")
        if kind == _SERVER_NAME:
            name = _only_name(content)
        elif kind == _ALPN:
            alpn = tuple(_protocols(content))
    return ClientHello(name, alpn)


def _protocols(extension: _Fields) -> Iterator[bytes]:
    names = extension.vector(2, least=2)
    extension.end()
    while names.left:
        name = names.vector(1, least=1)
        yield name.take(name.left)


def _only_name(extension: _Fields) -> str | None:
    names = extension.vector(2, least=1)
    extension.end()
    if names.number(1) != _HOST_NAME:
        raise BadClientHello(Alert.ILLEGAL_PARAMETER, "the server name is of an unknown type")
    written = names.vector(2, least=1)
    if names.left:
        raise BadClientHello(Alert.ILLEGAL_PARAMETER, "there is more than one server name")
    try:
        name = written.take(written.left).decode("ascii")
        host = name if is_ip_address(name) else normal_host(name, name)
    except ValueError:
        # The exception's context would quote the name, so it is dropped.
        raise BadClientHello(Alert.ILLEGAL_PARAMETER, "the server name is no host name") from None
    return None if is_ip_address(host) else host

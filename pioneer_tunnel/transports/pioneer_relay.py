"""The transports `tcp` and `tls`: relays that exist, Pioneer Relay and rathole, with a connection for each visitor.

One control channel per tunnel: dial, hello, nonce, proof, ack, each step under a deadline. From then on the relay asks
for data channels on it, a few in advance and one for each visitor. A data channel is a connection of its own, which
turns into the visitor's connection when the relay says so, byte for byte. There is no visitor's address, and no word
for what this end wants: it can only be there, or not.

Data channels go to the very machine that answered the control channel (`_same_machine`): behind the relay's name there
may be several, and the others do not know this session.

What ends with the control channel: everything. The streams that are being carried have connections of their own and
could outlive it, but nothing of a transport outlives `serve` (that is the seam's promise to the supervisor), and a
gateway that was told `reconnecting` should not be serving. So they end with a RST, which no visitor takes for a whole
answer.

Neighbours: `rathole_codec` knows the bytes, `key_mode` what is told of the key; `channel_stream` is what a visitor's
connection becomes.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, final

import trio

from ..address import RelayAddress
from ..channel_stream import ChannelStream
from ..dialer import Dialer, dial_relay, dial_tcp
from ..endings import abandon
from ..errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RemoteProtocolError,
    TunnelAuthError,
)
from ..groups import lone_error_bare
from ..sockets import keep_alive
from ..status import clean_message
from ..streams import WatchedStream, send_pieces
from ..tls_stream import TlsStream
from ..trust import client_tls
from ..tunnel_stream import TunnelStream
from .rathole_codec import (
    COMMAND_SIZE,
    Ack,
    Challenge,
    ChannelKind,
    ControlChannel,
    ControlCommand,
    ControlEvent,
    DataCommand,
    Hello,
    OtherVersionError,
    decode_data_command,
)
from .seam import Deliver, Report, Session, Target

__all__ = ["serve_tcp", "serve_tls"]

HEARTBEAT_TIMEOUT: Final = 40.0
"""Seconds of silence on the control channel after which the relay is dead. A relay beats every 30 seconds or more."""

DIAL_FOR: Final = 10.0
"""Seconds that a data channel may take to connect, retries included. After that the relay gives up on it as well."""

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0

MOST_IDLE: Final = 256
"""Data channels that may be connecting or waiting for their visitor at once. More are owed, and follow."""

MOST_OWED: Final = 64 * 1024

_READ_SIZE: Final = 4 * 1024

_log: Final = logging.getLogger("pioneer_tunnel.transports.pioneer_relay")


async def serve_tcp(
    target: Target,
    deliver: Deliver,
    report: Report,  # noqa: ARG001  # this protocol has nothing to report
    *,
    task_status: trio.TaskStatus[Session],
) -> NoReturn:
    """In clear: whoever can listen on the way reads what visitors send, their tokens included. See `Serve`."""
    await _serve(target, deliver, None, task_status)


async def serve_tls(
    target: Target,
    deliver: Deliver,
    report: Report,  # noqa: ARG001  # this protocol has nothing to report
    *,
    task_status: trio.TaskStatus[Session],
) -> NoReturn:
    """Each connection inside TLS. See `Serve`."""
    await _serve(target, deliver, (target.make_tls or client_tls)(), task_status)


async def _serve(
    target: Target, deliver: Deliver, tls: ssl.SSLContext | None, task_status: trio.TaskStatus[Session]
) -> NoReturn:
    address = target.address
    stream, watched = await dial_relay(address, dial=target.dial, tls=tls, timeout=target.connect_timeout)
    try:
        _keep_alive(watched)
        channel = ControlChannel(target.key_mode.id(target.key, target.service))
        proof, early = await _open(channel, stream, target)
        with lone_error_bare():
            async with trio.open_nursery() as nursery:
                hello = Hello(ChannelKind.DATA, proof).encode()
                channels = _DataChannels(
                    target,
                    hello,
                    dial=_same_machine(watched, target.dial),
                    tls=tls,
                    deliver=deliver,
                    nursery=nursery,
                )
                task_status.started(Session())
                if tls is None:
                    _log.warning(
                        "%s is reached in clear: on the way, visitors' traffic and tokens can be read", address
                    )
                try:
                    await _obey(channel, early, stream, channels, address)
                finally:
                    channels.end()
        raise AssertionError("a control channel ends by raising")
    finally:
        # There is no goodbye in this protocol, and nothing is queued.
        await trio.aclose_forcefully(stream)


async def _open(channel: ControlChannel, stream: trio.abc.Stream, target: Target) -> tuple[bytes, list[ControlEvent]]:
    """Come to terms with the relay; returns the proof, and what the relay has said beyond that."""
    with _failures_named(channel, target):
        with trio.fail_after(target.connect_timeout):
            await stream.send_all(channel.hello)
        challenge, *events = await _hear(channel, stream, target.connect_timeout)
        assert isinstance(challenge, Challenge)
        proof = target.key_mode.proof(target.key, challenge.nonce)
        if not events:
            # A relay that does not know the service has said so, and is gone before it reads this.
            with trio.fail_after(target.connect_timeout), suppress(trio.BrokenResourceError):
                await stream.send_all(channel.prove(proof))
            events = await _hear(channel, stream, target.connect_timeout)
    ack, *early = events
    if ack is Ack.SERVICE_NOT_EXIST:
        raise _unknown_service(target)
    if ack is Ack.AUTH_FAILED:
        raise TunnelAuthError(
            f"the relay at {target.address} rejected the key for the service {target.service!r}"
            f" (key mode {target.key_mode})"
        )
    return proof, early


async def _hear(channel: ControlChannel, stream: trio.abc.Stream, timeout: float) -> list[ControlEvent]:
    """What the relay says next, one thing at least."""
    with trio.fail_after(timeout):
        while True:
            data = await stream.receive_some(_READ_SIZE)
            if not data:
                raise trio.BrokenResourceError("it closed the connection")
            if events := channel.receive(data):
                return events


def _unknown_service(target: Target) -> InvalidSettingsError:
    address, service, mode = target.address, target.service, target.key_mode
    if mode.by_name:
        return InvalidSettingsError(
            f"the relay at {address} does not know the service {service!r} (key mode {mode}): service_name has to be"
            " the name that the relay's operator gave it"
        )
    return InvalidSettingsError(
        f"the relay at {address} does not know our key, with the service {service!r} (key mode {mode}): either it is"
        " another key than the relay's operator registered, or the relay finds services by name, and key_mode has to"
        " be token_hash or rathole"
    )


@contextmanager
def _failures_named(channel: ControlChannel, target: Target) -> Iterator[None]:
    """Tell what an opening failed of, in terms of what a person can do about it."""
    address = target.address
    try:
        yield
    except trio.TooSlowError:
        raise RelayConnectError(
            f"{address} did not say {channel.waits_for} within {target.connect_timeout:g} seconds"
        ) from None
    except OtherVersionError as error:
        raise RelayConnectError(f"{address} cannot be talked to: {error}", retry_slowly=True) from error
    except RemoteProtocolError as error:
        raise RelayConnectError(f"{address} is not a Pioneer relay or rathole: {error}") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        raise RelayConnectError(
            f"{address} broke off the opening before it had said {channel.waits_for}: {error}"
        ) from error


async def _obey(
    channel: ControlChannel,
    events: list[ControlEvent],
    stream: trio.abc.Stream,
    channels: _DataChannels,
    address: RelayAddress,
) -> NoReturn:
    """Do what the relay asks for until it is gone."""
    try:
        while True:
            for event in events:
                if event is ControlCommand.CREATE_DATA_CHANNEL:
                    channels.want()
            with trio.fail_after(HEARTBEAT_TIMEOUT):
                data = await stream.receive_some(_READ_SIZE)
            if not data:
                raise LinkLostError(f"the relay at {address} closed the control channel")
            events = channel.receive(data)
    except trio.TooSlowError:
        raise LinkLostError(
            f"the relay at {address} was silent for {HEARTBEAT_TIMEOUT:g} seconds, longer than any relay's heartbeat"
        ) from None
    except trio.BrokenResourceError as error:
        raise LinkLostError(f"the link to {address} is lost: {error}") from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"the relay at {address} broke a rule of the protocol: {error}") from error


@final
class _DataChannels:
    """The connections that a relay has asked for: each a task from its dialling until its visitor comes."""

    def __init__(
        self,
        target: Target,
        hello: bytes,
        *,
        dial: Dialer,
        tls: ssl.SSLContext | None,
        deliver: Deliver,
        nursery: trio.Nursery,
    ) -> None:
        self._target: Final = target
        self._hello: Final = hello
        self._dialer: Final = dial
        self._tls: Final = tls
        self._deliver: Final = deliver
        self._nursery: Final = nursery
        self._tls_session: ssl.SSLSession | None = None
        self._carried: Final[set[ChannelStream]] = set()
        self._idle = 0
        self._owed = 0
        self._ended = False

    def end(self) -> None:
        """End with a RST what is carried, and what has just come."""
        self._ended = True
        while self._carried:
            self._carried.pop().abandon()

    def want(self) -> None:
        """The relay wants one more."""
        self._owed = min(self._owed + 1, MOST_OWED)
        self._start()

    def _start(self) -> None:
        while self._owed and self._idle < MOST_IDLE:
            self._owed -= 1
            self._idle += 1
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        stream = await self._wait_for_visitor()
        self._idle -= 1
        self._start()
        if stream is None:
            return
        carried = ChannelStream(stream, self._nursery, self._carried.discard)
        self._carried.add(carried)
        if self._ended or len(self._carried) > self._target.limits.streams:
            carried.reset()
            return
        try:
            self._deliver(TunnelStream(carried))
        except trio.WouldBlock:
            carried.reset()

    async def _wait_for_visitor(self) -> trio.abc.Stream | None:
        """A connection that a visitor has now; None when nothing came of it."""
        stream = await self._dial()
        if stream is None:
            return None
        try:
            # No deadline: it stands in the relay's pool until somebody comes. The system's keepalive, and the end of
            # the control channel, end it.
            command = await _read_exactly(stream, COMMAND_SIZE)
            if command is None:
                _log.debug("%s closed a data channel that no visitor had come by", self._target.address)
            elif decode_data_command(command) is DataCommand.START_FORWARD_TCP:
                if isinstance(stream, TlsStream):
                    self._tls_session = stream.session
                visited, stream = stream, None
                return visited
            else:
                _log.error("%s forwards UDP to us, which this gateway does not carry", self._target.address)
        except (trio.BrokenResourceError, RemoteProtocolError) as error:
            _log.warning("a data channel to %s came to nothing: %s", self._target.address, error)
        finally:
            if stream is not None:
                await abandon(stream)
        return None

    async def _dial(self) -> trio.abc.Stream | None:
        """A connection on which the relay has been told what it is for; None when there is none to be had."""
        pause, failure = FIRST_PAUSE, "no answer"
        with trio.move_on_after(DIAL_FOR):
            while True:
                connected: trio.abc.Stream | None = None
                try:
                    connected = await self._dialer(self._target.address.host, self._target.address.port)
                    return await self._introduce(WatchedStream(connected))
                except (OSError, trio.BrokenResourceError) as error:
                    failure = str(error)
                    if connected is not None:
                        await abandon(connected)
                except BaseException:
                    if connected is not None:
                        await abandon(connected)
                    raise
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        _log.warning(
            "gave up on a data channel to %s after %g seconds: %s",
            self._target.address,
            DIAL_FOR,
            clean_message(failure),
        )
        return None

    async def _introduce(self, watched: WatchedStream) -> trio.abc.Stream:
        _keep_alive(watched)
        stream: trio.abc.Stream = watched
        if self._tls is not None:
            # The visitor may end one direction before the other, which `trio.SSLStream` has no word for.
            stream = secured = TlsStream(
                watched, self._tls, server_hostname=self._target.address.host, session=self._tls_session
            )
            await secured.do_handshake()
        await send_pieces(stream, [self._hello])
        return stream


async def _read_exactly(stream: trio.abc.Stream, amount: int) -> bytes | None:
    """`amount` bytes and not one more; None when the stream ends first."""
    received = b""
    while len(received) < amount:
        data = await stream.receive_some(amount - len(received))
        if not data:
            return None
        received += data
    return received


def _same_machine(watched: WatchedStream, dial: Dialer) -> Dialer:
    """A dialer that reaches the machine that `watched` reaches, whatever the relay's name resolves to by now.

    A dialer of the host's own is asked by name each time: what it connects to may be a proxy.
    """
    connected = watched.transport_stream
    if dial is not dial_tcp or not isinstance(connected, trio.SocketStream):
        return dial
    peer: tuple[Any, ...] = connected.socket.getpeername()
    if connected.socket.family == socket.AF_INET6 and peer[3]:
        return dial  # an address of one network interface only

    async def dial_again(host: str, port: int) -> trio.abc.Stream:  # noqa: ARG001
        return await dial_tcp(peer[0], peer[1])

    return dial_again


def _keep_alive(watched: WatchedStream) -> None:
    connected = watched.transport_stream
    if isinstance(connected, trio.SocketStream):
        keep_alive(connected, idle=20, interval=8)

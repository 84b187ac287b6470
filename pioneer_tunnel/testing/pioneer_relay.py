"""A relay for the transports `tcp` and `tls` (a Pioneer relay or rathole) that fails at scripted moments."""

from __future__ import annotations

import enum
import hmac
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio
import trio.testing

from .._model.addresses import Address
from .._model.errors import RemoteProtocolError
from .._model.exception_groups import open_tasks_beside_body
from .._model.keys import RelayKey
from .._net.adopted import adopt, watch
from .._net.closing import abandon
from .._net.tls.stream import TlsStream
from ..exchange.pump import pump
from ..transports.rathole.codec import (
    DIGEST_SIZE,
    HELLO_SIZE,
    Ack,
    ChannelKind,
    ControlCommand,
    DataCommand,
    Hello,
    encode_ack,
    encode_command,
)
from ..transports.rathole.key_mode import KeyMode

__all__ = ["Moment", "ScriptedPioneerRelay", "Trouble", "Way", "open_pioneer_relay"]

POOL: Final = 8
HEARTBEAT: Final = 30.0


@final
class Moment(enum.StrEnum):
    """A moment at which the relay has to act."""

    HELLO = "hello"
    """A gateway has sent its hello and waits for the relay's."""
    ACK = "ack"
    """It has sent its proof and waits for the relay's answer."""
    OPEN = "open"
    """The tunnel is up; the relay has not asked for data channels yet."""
    DATA = "data"
    """A data channel has sent its hello and waits for a visitor."""
    START = "start"
    """A visitor has connected; its data channel waits for the command to start."""


@final
class Way(enum.StrEnum):
    """What the relay does instead of the right thing."""

    STALL = "stall"
    """Nothing, for ever: the connection stays open."""
    DROP = "drop"
    """Close the connection."""
    RESET = "reset"
    """Reset the connection."""
    HALF = "half"
    """Send half of the message, then close."""
    JUNK = "junk"
    """Send bytes that are not of this protocol."""
    OTHER_VERSION = "other_version"
    """At `HELLO`: send a hello of protocol version 2."""
    UNKNOWN_SERVICE = "unknown_service"
    """At `ACK`: reject any proof with this reason. At `HELLO`: reject before the proof arrives, and close."""
    AUTH_FAILED = "auth_failed"
    """At `ACK`: reject any proof with this reason."""
    UDP = "udp"
    """At `START`: send the command to forward UDP."""


@final
@attrs.frozen
class Trouble:
    """One fault of the relay.

    Attributes:
        at: the moment.
        way: what the relay does then.
    """

    at: Moment
    way: Way


@final
class ScriptedPioneerRelay:
    """A relay of transports `tcp` and `tls` that follows a script; `open_pioneer_relay` makes one that runs.

        async with open_pioneer_relay(key=KEY, troubles=[Trouble(Moment.HELLO, Way.STALL)]) as relay:
            async with open_tunnel(str(relay.address), transport="tcp", key=KEY) as tunnel:
                ...
                async with await relay.visit() as visitor:
                    ...

    This relay sends nothing to the first gateway that connects, and serves the second. It listens on loopback: at
    `address` for gateways, at `visitors` for visitors. With `listen=False` there are no sockets: gateways connect
    through `dial`, a `Dialer`, and visitors through `visit`, over memory streams, so that the relay works under
    `trio.testing.MockClock`.

    Args:
        key: the key of its only tunnel.
        service: that tunnel's service (default `"pioneer_gateway"`).
        key_mode: how the relay uses the key (default: token routing).
        troubles: the fault for the first gateway that connects, for the second, and so on; None is no fault.
        then: the fault for every gateway after those (default: none).
        pool: number of data channels to ask for in advance (default 8).
        heartbeat: seconds between heartbeats (default 30); None sends none.
        tls: the TLS context of a relay for transport `tls` (default: None, transport `tcp`).
        listen: whether to listen on sockets (default True).
        random: source of the nonces (default: a new `Random`).

    Attributes:
        address: where gateways connect; without sockets, a name that `dial` accepts.
        visitors: where visitors connect.
        control_channels: number of control channels so far, one for each connect of a gateway.
        data_channels: number of data channels so far.
        asked_for: number of data channels that the relay has asked for.
    """

    def __init__(
        self,
        *,
        key: RelayKey,
        service: str = "pioneer_gateway",
        key_mode: KeyMode = KeyMode.TOKEN_ROUTING,
        troubles: Sequence[Trouble | None] = (),
        then: Trouble | None = None,
        pool: int = POOL,
        heartbeat: float | None = HEARTBEAT,
        tls: ssl.SSLContext | None = None,
        listen: bool = True,
        random: Random | None = None,
    ) -> None:
        self.address: Address = Address("127.0.0.1", 0) if listen else Address("relay.test", 2333)
        self.visitors: Address = Address("127.0.0.1", 0)
        self.control_channels: int = 0
        self.data_channels: int = 0
        self.asked_for = 0
        self._key: Final = key
        self._service: Final = service
        self._key_mode: Final = key_mode
        self._troubles: Final = tuple(troubles)
        self._then: Final = then
        self._pool: Final = pool
        self._heartbeat: Final = heartbeat
        self._tls: Final = tls
        self._listen: Final = listen
        self._random: Final = random or Random()  # noqa: S311  # a relay for tests
        self._gateway: _Gateway | None = None
        self._connections: trio.Nursery | None = None

    @property
    def connected(self) -> bool:
        """Whether a gateway is connected."""
        return self._gateway is not None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Run until cancelled. A second run listens at the same addresses, and starts without gateways."""
        try:
            async with trio.open_nursery() as nursery:
                self._connections = nursery
                if self._listen:
                    self.address = await self._listen_at(self.address, self._take_gateway, nursery)
                    self.visitors = await self._listen_at(self.visitors, self._take_visitor, nursery)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._connections = self._gateway = None
        raise AssertionError("sleep_forever returned")

    async def _listen_at(self, address: Address, handler: object, nursery: trio.Nursery) -> Address:
        serve = partial(trio.serve_tcp, host=address.host)
        listeners: list[trio.SocketListener] = await nursery.start(serve, handler, address.port)
        return Address(address.host, listeners[0].socket.getsockname()[1])

    async def dial(self, host: str, port: int) -> trio.abc.Stream:  # noqa: ARG002
        """Connect as a gateway, over a memory stream; this method is a `Dialer`.

        Raises:
            ConnectionRefusedError: the relay does not run.
        """
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._running().start_soon(self._take_gateway, theirs)
        return ours

    async def visit(self) -> trio.abc.HalfCloseableStream:
        """Connect as a visitor.

        Raises:
            OSError: the relay does not run.
        """
        if self._listen:
            return await trio.open_tcp_stream(self.visitors.host, self.visitors.port)
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._running().start_soon(self._take_visitor, theirs)
        return ours

    def ask_for_data_channel(self) -> None:
        """Ask the connected gateway for one more data channel, without a visitor for it."""
        assert self._gateway is not None, "no gateway is connected"
        self._gateway.ask()

    def tell(self, data: bytes) -> None:
        """Send `data` on the control channel of the connected gateway."""
        assert self._gateway is not None, "no gateway is connected"
        self._gateway.to_send.send_nowait(data)

    def drop_gateway(self) -> None:
        """Close the control channel of the connected gateway."""
        assert self._gateway is not None, "no gateway is connected"
        self._gateway.scope.cancel()

    def _running(self) -> trio.Nursery:
        if self._connections is None:
            raise ConnectionRefusedError("the scripted relay does not run")
        return self._connections

    async def _take_gateway(self, connected: trio.SocketStream | trio.StapledStream) -> None:  # type: ignore[type-arg]
        stream: trio.abc.Stream = watch(connected)
        try:
            if self._tls is not None:
                stream = secured = TlsStream(stream, self._tls, server_side=True)
                await secured.do_handshake()
            hello = Hello.decode(await _read(stream, HELLO_SIZE))
            assert hello is not None
            if hello.kind is ChannelKind.CONTROL:
                await self._be_control_channel(stream, hello.digest)
                await trio.aclose_forcefully(stream)
            else:
                self.data_channels += 1
                await self._be_data_channel(stream, hello.digest)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError, RemoteProtocolError):
            await trio.aclose_forcefully(stream)
        except BaseException:
            await abandon(stream)
            raise

    async def _be_control_channel(self, stream: trio.abc.Stream, service: bytes) -> None:
        number = self.control_channels
        self.control_channels += 1
        trouble = self._troubles[number] if number < len(self._troubles) else self._then
        nonce = self._random.randbytes(DIGEST_SIZE)
        known = service == self._key_mode.id(self._key, self._service)
        greeting = Hello(ChannelKind.CONTROL, nonce).encode()
        if trouble == Trouble(Moment.HELLO, Way.UNKNOWN_SERVICE):
            known, trouble = False, None
        if await _goes_wrong(stream, trouble, Moment.HELLO, greeting):
            return
        await stream.send_all(greeting)
        if not known:
            # Like the originals: do not wait for the proof. It arrives at a closed connection.
            await stream.send_all(encode_ack(Ack.SERVICE_NOT_EXIST))
            return
        expected = self._key_mode.proof(self._key, nonce)
        proof = await _read(stream, DIGEST_SIZE)
        if await _goes_wrong(stream, trouble, Moment.ACK, encode_ack(Ack.OK)):
            return
        if not hmac.compare_digest(proof, expected):
            await stream.send_all(encode_ack(Ack.AUTH_FAILED))
            return
        await stream.send_all(encode_ack(Ack.OK))
        gateway = _Gateway(expected, trouble, self)
        if self._gateway is not None:
            self._gateway.scope.cancel()  # the newest one wins
        self._gateway = gateway
        try:
            with gateway.scope:
                if not await _goes_wrong(stream, trouble, Moment.OPEN, encode_command(ControlCommand.HEARTBEAT)):
                    await gateway.run(stream, pool=self._pool, heartbeat=self._heartbeat)
        finally:
            gateway.waiting.close()
            if self._gateway is gateway:
                self._gateway = None

    async def _be_data_channel(self, stream: trio.abc.Stream, session: bytes) -> None:
        gateway = self._gateway
        if gateway is None or session != gateway.session:
            await trio.aclose_forcefully(stream)
        elif not await _goes_wrong(
            stream, gateway.trouble, Moment.DATA, encode_command(DataCommand.START_FORWARD_TCP), closing=True
        ):
            used = trio.Event()
            gateway.waiting.send_nowait((stream, used))
            await used.wait()  # no deadline: it waits in the pool. Returning would let the listener close the stream

    async def _take_visitor(self, visitor: trio.SocketStream | trio.StapledStream) -> None:  # type: ignore[type-arg]
        gateway = self._gateway
        if gateway is None:
            await visitor.aclose()
            return
        gateway.ask()
        start = encode_command(DataCommand.START_FORWARD_TCP)
        with suppress(trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                channel, used = await gateway.channels.receive()
                try:
                    if await _goes_wrong(channel, gateway.trouble, Moment.START, start, closing=True):
                        continue
                    await channel.send_all(start)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    await trio.aclose_forcefully(channel)
                    gateway.ask()
                else:
                    await pump(watch(visitor), adopt(channel))
                    return
                finally:
                    used.set()
        await visitor.aclose()


@final
class _Gateway:
    """A connected gateway."""

    def __init__(self, session: bytes, trouble: Trouble | None, relay: ScriptedPioneerRelay) -> None:
        self.session: Final = session
        self.trouble: Final = trouble
        self.scope: Final = trio.CancelScope()
        self.waiting, self.channels = trio.open_memory_channel[tuple[trio.abc.Stream, trio.Event]](float("inf"))
        self.to_send, self._queued = trio.open_memory_channel[bytes](float("inf"))
        self._relay: Final = relay

    def ask(self) -> None:
        """Ask for one more data channel."""
        self._relay.asked_for += 1
        self.to_send.send_nowait(encode_command(ControlCommand.CREATE_DATA_CHANNEL))

    async def run(self, stream: trio.abc.Stream, *, pool: int, heartbeat: float | None) -> None:
        """Send commands and heartbeats until the gateway closes the connection."""
        for _ in range(pool):
            self.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, stream)
            if heartbeat is not None:
                nursery.start_soon(self._beat, heartbeat)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some(1024):
                    pass
            nursery.cancel_scope.cancel()

    async def _send(self, stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in self._queued:
                await stream.send_all(data)

    async def _beat(self, heartbeat: float) -> None:
        while True:
            await trio.sleep(heartbeat)
            self.to_send.send_nowait(encode_command(ControlCommand.HEARTBEAT))


@asynccontextmanager
async def open_pioneer_relay(
    *,
    key: RelayKey,
    service: str = "pioneer_gateway",
    key_mode: KeyMode = KeyMode.TOKEN_ROUTING,
    troubles: Sequence[Trouble | None] = (),
    then: Trouble | None = None,
    pool: int = POOL,
    heartbeat: float | None = HEARTBEAT,
    tls: ssl.SSLContext | None = None,
    listen: bool = True,
    random: Random | None = None,
) -> AsyncIterator[ScriptedPioneerRelay]:
    """Run a `ScriptedPioneerRelay` during an `async with`. The arguments are those of `ScriptedPioneerRelay`.

    An exception of the body is raised without a group.
    """
    relay = ScriptedPioneerRelay(
        key=key,
        service=service,
        key_mode=key_mode,
        troubles=troubles,
        then=then,
        pool=pool,
        heartbeat=heartbeat,
        tls=tls,
        listen=listen,
        random=random,
    )
    async with open_tasks_beside_body() as nursery:
        await nursery.start(relay.run)
        yield relay


async def _goes_wrong(
    stream: trio.abc.Stream, trouble: Trouble | None, now: Moment, due: bytes, *, closing: bool = False
) -> bool:
    """Act out `trouble` if its moment is `now`. If not, return False: the caller then sends `due`.

    Args:
        closing: whether to close the connection too; False if the caller closes it.
    """
    if trouble is None or trouble.at is not now:
        return False
    match trouble.way:
        case Way.STALL:
            await trio.sleep_forever()
        case Way.RESET:
            await abandon(stream)
        case Way.HALF:
            await stream.send_all(due[: len(due) // 2])
        case Way.JUNK:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        case Way.OTHER_VERSION:
            await stream.send_all(due[:4] + b"\x02" + due[5:])
        case Way.UNKNOWN_SERVICE:
            await stream.send_all(encode_ack(Ack.SERVICE_NOT_EXIST))
        case Way.AUTH_FAILED:
            await stream.send_all(encode_ack(Ack.AUTH_FAILED))
        case Way.UDP:
            await stream.send_all(encode_command(DataCommand.START_FORWARD_UDP))
    if closing:
        await trio.aclose_forcefully(stream)
    return True


async def _read(stream: trio.abc.Stream, amount: int) -> bytes:
    received = b""
    while len(received) < amount:
        data = await stream.receive_some(amount - len(received))
        if not data:
            raise EOFError
        received += data
    return received

"""The data channels of one session, from the relay's request until a visitor comes.

A data channel is dialled, sends its hello, and waits for the relay's command that a visitor has come. From then on it
is the visitor's connection, byte for byte.

There are two ways to wait. In clear, on Linux, the reactor watches the descriptors; when the connection is established
at once, a data channel needs no task at all. Otherwise, as over TLS, each data channel has a task until its visitor
comes. A data channel that takes time to connect, has to retry, or goes through a proxy also has a task until it is
connected.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from typing import Final, final

import trio

from ..._model.addresses import Address
from ..._model.errors import LinkLostError, RelayConnectError, RemoteProtocolError
from ..._model.log_fields import about
from ..._model.services import FIRST_SERVICE
from ..._model.text import clean_message
from ..._net.adopted import Watched, watch
from ..._net.closing import abandon
from ..._net.dialing import Attempt, begin_dial, dial_tcp
from ..._net.fastpath.event_loop import CAN_WATCH, Reactor
from ..._net.fastpath.stay import Stay
from ..._net.log_limiter import LogLimiter
from ..._net.proxies.entering import Via
from ..._net.proxies.handshake import CredentialsRefused
from ..._net.socket_options import Socket, descriptor_of, keep_alive, reset_on_close
from ..._net.streams import ByteStream
from ..._net.tcp import TcpStream
from ..._net.tls.stream import TlsStream
from ..interface import Deliver, Target
from ..tunnel_stream import TunnelStream
from .channel_stream import ChannelStream
from .codec import COMMAND_SIZE, DataCommand, decode_data_command

__all__ = ["MOST_IDLE", "DataChannels", "staying"]

DIAL_FOR: Final = 10.0
"""Seconds that a data channel may take to connect, retries included. The relay waits no longer than that either."""

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0

MOST_IDLE: Final = 256
"""Data channels that may at once be connecting, be waiting for a visitor, or have a visitor that is not accepted yet.

Further requests of the relay are counted (`_owed`) and served later. So a burst of visitors waits at the relay and does
not overrun the application.
"""

MOST_OWED: Final = 64 * 1024

STARTS_PER_TURN: Final = 32
"""Data channels that are dialled before other tasks run.

When as many in a row are lost before a visitor came, there is a pause before each turn.
"""
ENDS_PER_TURN: Final = 32
"""Visitors that are reset before other tasks run, when the session ends: each reset makes a handler end."""

_log: Final = logging.getLogger("pioneer_tunnel.transports.data_channels")
_log_limiter: Final = LogLimiter(_log)


@contextmanager
def staying(tls: ssl.SSLContext | None) -> Iterator[Stay | None]:
    """The stay in the reactor, around `DataChannels` and its nursery; None where each data channel has a task."""
    with ExitStack() as stack:
        stay = None
        if CAN_WATCH and tls is None:
            with suppress(OSError):  # out of descriptors
                stay = stack.enter_context(Stay())
        yield stay


@final
class DataChannels:
    """All data channels of one session.

    Args:
        target: the relay, and how it is dialled.
        hello: the first bytes of each data channel.
        machine: the IP address and port to dial; None to dial the name of the relay or the proxy.
        via: the proxy on the way; None for none.
        tls: the TLS context; None for connections in clear.
        max_streams: visitors' connections that may be open at once; more are reset.
        deliver: takes visitors' streams.
        nursery: for their tasks.
        stay: see `staying`.
    """

    def __init__(
        self,
        target: Target,
        hello: bytes,
        *,
        machine: Address | None,
        via: Via | None,
        tls: ssl.SSLContext | None,
        max_streams: int,
        deliver: Deliver,
        nursery: trio.Nursery,
        stay: Stay | None,
    ) -> None:
        self._target: Final = target
        self._counter: Final = target.counts.services.of(FIRST_SERVICE)
        self._hello: Final = hello
        self._machine: Final = machine
        self._via: Final = via
        self._tls: Final = tls
        self._max_streams: Final = max_streams
        self._deliver: Final = deliver
        self._nursery: Final = nursery
        self._reactor: Final = None if stay is None else stay.reactor
        self.context: Final = copy_context()  # the reactor may call back in a task of another session
        self._tls_session: ssl.SSLSession | None = None
        self._watched: Final[set[_Watched]] = set()
        self._carried: Final[set[ChannelStream]] = set()
        self._idle = 0
        self._owed = 0
        self._starts_left = STARTS_PER_TURN
        self._pausing = False
        self._lost_in_a_row = 0
        self._draining = False
        self._visitor_left: Final = trio.lowlevel.ParkingLot()
        self._ended = False
        self._refusal: RelayConnectError | None = None
        if stay is not None:
            nursery.start_soon(stay.wait)

    def want(self) -> None:
        """The relay asks for one more data channel."""
        self._owed = min(self._owed + 1, MOST_OWED)
        self._start()

    async def drain(self) -> None:
        """Reset visitors that come from now on, and wait until the others have gone. The caller sets the deadline.

        The protocol cannot ask the relay for no more visitors.
        """
        self._draining = True
        while self._carried and not self._ended:
            await self._visitor_left.park()

    async def end(self) -> None:
        """Reset all connections: with a visitor, waiting for one, and those that are established later.

        Raises:
            LinkLostError: the proxy has ended the session, see `_note_refusal`.
        """
        self._ended = True
        self._visitor_left.unpark_all()
        while self._watched:
            self._watched.pop().abandon()
        ended = 0
        with trio.CancelScope(shield=True):
            while self._carried:
                self._carried.pop().abandon()
                ended += 1
                if not ended % ENDS_PER_TURN:
                    await trio.lowlevel.checkpoint()
        if self._refusal is not None:
            raise LinkLostError(str(self._refusal)) from self._refusal

    def _start(self) -> None:
        while self._owed and self._idle < MOST_IDLE and not self._ended:
            if not self._starts_left:
                if not self._pausing:
                    self._pausing = True
                    self._nursery.start_soon(self._pause)
                return
            self._starts_left -= 1
            self._owed -= 1
            self._idle += 1
            if self._reactor is None or self._machine is None or self._via is not None:
                self._nursery.start_soon(self._run)
            else:
                self._start_at_once(self._reactor, self._machine)

    async def _pause(self) -> None:
        """Let other tasks run before the next turn. While data channels are lost, pause for 50 ms.

        The pause does not grow: visitors who leave at once cause the same losses, and other visitors would wait for it.
        """
        await trio.sleep(FIRST_PAUSE if self._lost_in_a_row >= STARTS_PER_TURN else 0)
        self._starts_left = STARTS_PER_TURN
        self._pausing = False
        self._start()

    def _start_at_once(self, reactor: Reactor, machine: Address) -> None:
        try:
            attempt = begin_dial(machine.host, machine.port)
            connected = None if attempt is None else attempt.at_once()
        except OSError:
            self._nursery.start_soon(self._run)  # which retries
            return
        if connected is None:
            self._nursery.start_soon(self._run, attempt)
            return
        keep_alive(connected)
        reset_on_close(connected)
        try:
            said = os.write(descriptor_of(connected), self._hello)
        except OSError:
            said = 0
        if said < len(self._hello) or not self._watch(reactor, connected):
            connected.close()
            self._nursery.start_soon(self._run)

    async def _run(self, attempt: Attempt | None = None) -> None:
        """One data channel in a task: until the reactor can watch it, or until its visitor comes."""
        stream = await self._dial(attempt)
        if stream is None:
            self.note_lost()
        elif self._reactor is not None and type(stream) is TcpStream and self._watch(self._reactor, stream.socket):
            pass  # the reactor waits for its visitor
        elif await self._wait_for_visitor(stream):
            self.take_visitor(stream)
        else:
            self.note_lost()

    def _watch(self, reactor: Reactor, connected: Socket) -> bool:
        """Let it wait without a task; False when the system has no more watches."""
        try:
            watched = _Watched(connected, self, reactor)
        except OSError:
            return False
        if self._ended:
            watched.abandon()
        else:
            self._watched.add(watched)
        return True

    def note_lost(self, watched: _Watched | None = None) -> None:
        """A data channel ended before a visitor came."""
        if watched is not None:
            self._watched.discard(watched)
        self._lost_in_a_row += 1
        self._free_slot()

    def _note_accepted(self) -> None:
        self._lost_in_a_row = 0
        self._free_slot()

    def _free_slot(self) -> None:
        self._idle -= 1
        self._start()

    def _note_over(self, carried: ChannelStream) -> None:
        self._carried.discard(carried)
        if carried.counted:
            carried.counted = False
            self._counter.end()
        if self._draining:
            self._visitor_left.unpark_all()
        if not carried.accepted:
            self._free_slot()

    def take_visitor(self, stream: ByteStream, watched: _Watched | None = None) -> None:
        """A data channel has its visitor."""
        if watched is not None:
            self._watched.discard(watched)
        carried = ChannelStream(stream, self._nursery, on_accepted=self._note_accepted, on_closed=self._note_over)
        self._carried.add(carried)
        if self._ended or self._draining:
            carried.reset()
            return
        try:
            if len(self._carried) > self._max_streams:
                raise trio.WouldBlock
            self._counter.begin()
            carried.counted = True
            self._deliver(TunnelStream(carried))
        except trio.WouldBlock:
            self._target.counts.refusals["backlog_full"] += 1
            carried.reset()
            self._complain("no room", "a visitor was turned away: there are as many as there may be")

    def says_visitor(self, command: bytes) -> bool:
        """Whether `command` says that a TCP visitor has come; logs why not."""
        try:
            if decode_data_command(command) is DataCommand.START_FORWARD_TCP:
                return True
            self._complain("UDP", f"{self._target.address} forwards UDP to us, which this gateway does not carry")
        except RemoteProtocolError as error:
            self.log_lost(error)
        return False

    def log_lost(self, reason: Exception | None) -> None:
        """Log why a data channel ended before a visitor came; None when the relay closed it."""
        if reason is None:
            _log.debug("%s closed a data channel that no visitor had come by", self._target.address)
        else:
            why = clean_message(str(reason))
            self._complain("lost", f"a data channel to {self._target.address} came to nothing: {why}")

    def _complain(self, kind: str, text: str) -> None:
        fields = about("data_channel_failed", peer=self._target.address, reason=kind)
        _log_limiter.log((kind, self._target.address), text, about=fields)

    async def _wait_for_visitor(self, stream: Watched | TlsStream) -> bool:
        visited = False
        try:
            # No deadline: it waits in the relay's pool until a visitor comes. TCP keepalive and the end of the control
            # channel end the wait.
            command = await _read_exactly(stream, COMMAND_SIZE)
            if command is None:
                self.log_lost(None)
            else:
                visited = self.says_visitor(command)
            if self._tls is not None and isinstance(stream, TlsStream) and not stream.session_reused:
                self._tls_session = stream.session
        except trio.BrokenResourceError as error:
            self.log_lost(error)
        finally:
            if not visited:
                await abandon(stream)
        return visited

    async def _dial(self, attempt: Attempt | None) -> Watched | TlsStream | None:
        """Connect and send the hello, with retries; None when that fails for `DIAL_FOR` seconds."""
        pause, failure = FIRST_PAUSE, "no answer"
        with trio.move_on_after(DIAL_FOR):
            while True:
                connected: Watched | TlsStream | None = None
                try:
                    connected = await self._connect(attempt)
                    return await self._introduce(connected)
                except (OSError, trio.BrokenResourceError, RelayConnectError) as error:
                    failure = str(error)
                    if isinstance(error, RelayConnectError):
                        self._note_refusal(error)
                        pause = max(LONGEST_PAUSE, error.retry_after or 0)  # the proxy may be busy
                    if connected is not None:
                        await abandon(connected)
                except BaseException:
                    if connected is not None:
                        await abandon(connected)
                    raise
                attempt = None
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        why = f"after {DIAL_FOR:g} seconds: {clean_message(failure)}"
        self._complain("not connected", f"gave up on a data channel to {self._target.address} {why}")
        return None

    def _note_refusal(self, refusal: RelayConnectError) -> None:
        """End the session if the proxy refuses the credentials that it has accepted before: they have changed.

        The next session reads them again. Asking again and again with old ones could lock the account.
        """
        if isinstance(refusal.__cause__, CredentialsRefused):
            self._refusal = refusal
            self._nursery.cancel_scope.cancel()

    async def _connect(self, attempt: Attempt | None) -> Watched | TlsStream:
        address, via, machine = self._target.address, self._via, self._machine
        connected: Watched
        if attempt is not None:
            connected = TcpStream(await attempt.wait())
        elif machine is not None:
            connected = watch(await dial_tcp(machine.host, machine.port))
        else:
            first = address if via is None else via.proxy
            connected = watch(await self._target.dial(first.host, first.port))
        if isinstance(connected, TcpStream):
            connected.plain_socket.arm_reset()  # a visitor's connection ends with RST unless it sent FIN
        return connected if via is None else await via.enter(connected, address.host, address.port, timeout=DIAL_FOR)

    async def _introduce(self, connected: Watched | TlsStream) -> Watched | TlsStream:
        lowest = connected.lowest_socket
        if lowest is not None:
            keep_alive(lowest.socket)
        stream = connected
        if self._tls is not None:
            # A visitor may end one direction before the other. `trio.SSLStream` cannot do that, `TlsStream` can.
            stream = TlsStream(
                connected, self._tls, server_hostname=self._target.address.host, session=self._tls_session
            )
            await stream.do_handshake()
        await stream.send_pieces([self._hello])
        return stream


@final
class _Watched:
    """A data channel that waits for its visitor without a task. Closing its socket sends RST (`LentSocket.resets`)."""

    __slots__ = ("_channels", "_command", "_connected", "_descriptor", "_reactor")

    def __init__(self, connected: Socket, channels: DataChannels, reactor: Reactor) -> None:
        self._connected: Final = connected
        self._channels: Final = channels
        self._reactor: Final = reactor
        self._descriptor: Final = descriptor_of(connected)
        self._command = b""
        reactor.watch(self._descriptor, self._on_events)

    def abandon(self) -> None:
        """Close it with RST."""
        self._reactor.unwatch(self._descriptor)
        self._connected.close()

    def _on_events(self, events: int) -> None:  # noqa: ARG002  # the read shows what happened
        self._channels.context.run(self._read)

    def _read(self) -> None:
        try:
            while missing := COMMAND_SIZE - len(self._command):
                data = os.read(self._descriptor, missing)
                if not data:
                    self._lose(None)
                    return
                self._command += data
        except BlockingIOError:
            return  # the next edge brings more
        except OSError as error:
            self._lose(error)
            return
        if self._channels.says_visitor(self._command):
            self._reactor.unwatch(self._descriptor)
            self._channels.take_visitor(TcpStream(self._connected, resets=True), self)
        else:
            self.abandon()
            self._channels.note_lost(self)

    def _lose(self, reason: OSError | None) -> None:
        self._channels.log_lost(reason)
        self.abandon()
        self._channels.note_lost(self)


async def _read_exactly(stream: trio.abc.Stream, amount: int) -> bytes | None:
    """Exactly `amount` bytes; None when the stream ends first."""
    received = b""
    while len(received) < amount:
        data = await stream.receive_some(amount - len(received))
        if not data:
            return None
        received += data
    return received

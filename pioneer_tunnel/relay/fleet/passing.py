"""Passes visitors' connections between the workers of one machine, over Unix sockets (SCM_RIGHTS).

There is one channel from each process to each other one, made when it is needed first. A message is one connection, or
those of a turn. So the other process wakes once for all of them. A connection is not passed on while there is no
channel, or when the channel is full: then its visitor is served here, by a hop. That holds for a process of another
version, too, to which there is none.

A process that stops takes what is in its channels, and its end of them refuses more. So no connection is lost.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn, TypeAlias, final

import trio

from ..._model.addresses import Address
from ..._model.errors import StorageError
from ..._model.log_fields import about
from ..._net.fastpath.stay import Stay
from ..._net.log_limiter import LogLimiter
from ..._net.turn import Turn
from ..accept_loop import accept_next
from ..connection import Connection, log_unforeseen
from ..tunnels import Route
from ..visitors.passing import Passed, Passing, Stage, Way
from ..visitors.visit import Visit
from .passed_message import FORMAT, MOST_RECEIVED, encode_passed, parse_passed
from .records import Holding
from .unix_network import WorkerNetwork

__all__ = ["MOST_TOGETHER", "SocketPassing", "Where"]

VISITORS: Final = f"visitors.{FORMAT}"
"""The kind of socket where a worker takes visitors of the others."""

CONNECT_TIMEOUT: Final = 2.0
"""Seconds for connecting to another worker."""

RETRY_INTERVAL: Final = 0.5
"""Seconds between two attempts to connect to another worker. Meanwhile its visitors are served by a hop."""

ABSENT_INTERVAL: Final = 30.0
"""The same for a process that takes no visitors in this format: it never begins to."""

_BUFFERED: Final = 1024 * 1024
"""Bytes that a channel holds."""

MOST_TOGETHER: Final = 32
"""Connections in a message, and connections that are taken before others have their turn."""

# As numbers: the arithmetic of an enum takes some calls.
_TRUNCATED: Final = int(socket.MSG_TRUNC)
_DESCRIPTORS_CUT: Final = int(socket.MSG_CTRUNC)
_SPACE: Final = socket.CMSG_LEN(MOST_TOGETHER * array("i").itemsize)
_MOST_BYTES: Final = MOST_RECEIVED + MOST_TOGETHER * 1024

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))

Where: TypeAlias = Callable[[str], Holding | None]
"""The session of another worker that the next visitor of a tunnel goes to; None if it stays here. Does not wait."""


@final
class SocketPassing(Passing):
    """Passes connections to the other workers of this machine, and takes theirs. Linux only.

    Args:
        network: the workers.
        where: see `Where`.
        random: spreads attempts to reach a worker.

    Attributes:
        passed: connections so far.
    """

    def __init__(self, network: WorkerNetwork, where: Where, random: random.Random) -> None:
        self._network: Final = network
        self._where: Final = where
        self._random: Final = random
        self._channels: Final[dict[tuple[str, str | None], Channel]] = {}
        self._tasks: trio.Nursery | None = None
        self.passed = 0

    def way(self, tunnel_id: str) -> Channel | None:
        holding = self._where(tunnel_id)
        return None if holding is None else self._channel((holding.node, holding.process))

    def pass_visitor(
        self,
        connection: Connection,
        stage: Stage,
        route: Route,
        received: bytes = b"",
        *,
        visit: Visit | None = None,
    ) -> bool:
        if not connection.may_pass:
            return False
        connection.may_pass = False
        way = self.way(route.entry.id)
        if way is None:
            return False
        tunnel, service = (route.entry.id, route.service or "") if stage is Stage.BOUND else ("", "")
        return way.send(Passed(connection.descriptor, stage, *_whose(connection, visit), tunnel, service, received))

    def pass_gateway(self, visit: Visit, node: str, received: bytes) -> bool:
        connection = visit.connection
        if connection is None or not connection.may_pass:
            return False
        connection.may_pass = False
        passed = Passed(connection.descriptor, Stage.GATEWAY, *_whose(connection, visit), "", "", received)
        channel = self._channel((node, None))
        return channel is not None and channel.send(passed)

    def _channel(self, to: _To) -> Channel | None:
        """The channel to a process; None while it is not connected."""
        channel = self._channels.get(to)
        if channel is None or channel.is_over:
            self._open(to)
            return None
        return None if channel.socket is None else channel

    def _open(self, to: _To) -> None:
        """Begin to open a channel, if there is a way to that process."""
        if self._tasks is None or not self._network.reaches(to[0]):
            return
        for other in [other for other, channel in self._channels.items() if channel.is_over]:
            del self._channels[other]
        channel = self._channels[to] = Channel(self._random, self._count)
        self._tasks.start_soon(channel.run, self._network, *to)

    def _count(self, amount: int) -> None:
        self.passed += amount

    async def serve(
        self, take: Callable[[Passed], object], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        with self._network.listening(VISITORS, socket.SOCK_SEQPACKET) as listening:
            listener = trio.socket.from_stdlib_socket(listening)
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                task_status.started()
                try:
                    while True:
                        connected, _ = await accept_next(listener.accept)
                        nursery.start_soon(self._take_from, connected, take)
                finally:
                    self._tasks = None
                    self._channels.clear()
        raise AssertionError("it ends only by being cancelled")

    async def _take_from(self, connected: trio.socket.SocketType, take: Callable[[Passed], object]) -> None:
        """Take what another process passes, until it ends."""
        try:
            self._network.name_of(connected)
        except trio.BrokenResourceError as error:
            connected.close()
            _note("node_refused", f"a process wanted to pass visitors, and is refused: {error}", str(error))
            return
        with socket.socket(fileno=connected.detach()) as channel, Stay() as stay:
            channel.setblocking(False)
            source = Source(channel, take, stay)
            with suppress(OSError):  # the event loop cannot watch it: out of memory
                source.begin()
                try:
                    # No deadline: the other process passes something when it has something.
                    await stay.wait()
                finally:
                    source.stop()


_To: TypeAlias = tuple[str, str | None]
"""A node, and which process of it; None for the one that began last."""


def _whose(connection: Connection, visit: Visit | None) -> tuple[Address | None, Address | None, bool | None]:
    """The `peer`, `local` and `tls` of a connection that is passed on."""
    if visit is None:
        return connection.peer, connection.local, False
    return visit.visitor, visit.local, visit.tls


@final
class Channel(Way):
    """The channel to another process.

    Args:
        random: as of `SocketPassing`.
        count: called with how many connections were passed on.

    Attributes:
        socket: while it is connected.
        is_over: whether it broke, or could not be had.
    """

    def __init__(self, random: random.Random, count: Callable[[int], object]) -> None:
        self._random: Final = random
        self._count: Final = count
        self._turn: Final = Turn.current()
        self._waiting: list[tuple[Passed, Callable[[Passed], object]]] = []  # for the end of the turn
        self._waiting_bytes = 0
        self.socket: socket.socket | None = None
        self.is_over = False

    async def run(self, network: WorkerNetwork, node: str, process: str | None) -> None:
        """Connect, and keep the channel until it breaks. If it cannot be had, wait before the next attempt."""
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                connected = await network.connect(node, process, VISITORS, socket.SOCK_SEQPACKET)
        except (OSError, StorageError, trio.BrokenResourceError, trio.TooSlowError) as error:
            why, interval = str(error) or f"nothing within {CONNECT_TIMEOUT:g} seconds", RETRY_INTERVAL
            if isinstance(error, FileNotFoundError):
                why = "that process has ended, or is of another version"
                if process is not None:  # else the name may lead to another process soon
                    interval = ABSENT_INTERVAL
            line = f"no visitors can be passed to node {node}, they take a hop: {why}"
            _note("node_unreachable", line, why, peer=node)
            await trio.sleep(interval * self._random.uniform(0.5, 1))
        else:
            with socket.socket(fileno=connected.detach()) as channel:
                channel.setblocking(False)
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFERED)
                self.socket = channel
                try:
                    # No deadline. The other process sends nothing: this waits for its end.
                    await trio.lowlevel.wait_readable(channel)
                finally:
                    self.socket = None
        finally:
            self.is_over = True

    def send(self, passed: Passed) -> bool:
        """Pass a connection on, if that takes no time."""
        return len(passed.received) <= MOST_RECEIVED and self._send([passed])

    def _send(self, together: Sequence[Passed]) -> bool:
        """Pass connections on, all of them or none."""
        if self.socket is None:
            return False
        message: list[bytes] = []
        for passed in together:
            message += encode_passed(passed), passed.received
        descriptors = array("i", [passed.descriptor for passed in together])
        try:
            self.socket.sendmsg(message, ((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors),))
        except OSError:
            return False  # it is full, or the other process takes no more
        self._count(len(together))
        return True

    def send_soon(self, passed: Passed, otherwise: Callable[[Passed], object]) -> None:
        size = len(passed.received)
        if len(self._waiting) == MOST_TOGETHER or self._waiting_bytes + size > MOST_RECEIVED:
            self._send_waiting()
        if not self._waiting:
            self._turn.at_end(self._send_waiting)
        self._waiting.append((passed, otherwise))
        self._waiting_bytes += size

    def _send_waiting(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        sent = self._send([passed for passed, _ in waiting])
        for passed, otherwise in waiting:
            if sent:
                os.close(passed.descriptor)
            else:
                otherwise(passed)


@final
class Source:
    """What another process passes to this one.

    Args:
        channel: not blocking.
        take: called for each connection. It closes one for which it raises.
        stay: ended when the channel has ended.
    """

    def __init__(self, channel: socket.socket, take: Callable[[Passed], object], stay: Stay) -> None:
        self._socket: Final = channel
        self._take: Final = take
        self._stay: Final = stay
        self._buffer: Final = bytearray(_MOST_BYTES)
        self._over = False

    def begin(self) -> None:
        """Begin to take.

        Raises:
            OSError: the event loop cannot watch the channel.
        """
        self._stay.reactor.watch(self._socket.fileno(), self._on_events)
        self._stay.reactor.queue(self._receive)  # something may wait already

    def stop(self) -> None:
        """Refuse more, and take what is there."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        while not self._over and self._receive_some():
            pass
        self._over = True
        self._stay.reactor.unwatch(self._socket.fileno())

    def _on_events(self, events: int) -> None:  # noqa: ARG002  # the receive finds out
        self._receive()

    def _receive(self) -> int:
        """Take what is there, and let others have their turn in between."""
        taken = 0
        while taken < MOST_TOGETHER:
            if self._over or not (amount := self._receive_some()):
                return 0
            taken += amount
        self._stay.reactor.queue(self._receive)
        return 0

    def _receive_some(self) -> int:
        """Take the connections of a message. Returns how many there were, at least 1; 0 if there is no message."""
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into((self._buffer,), _SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return 0
        except OSError:
            size, ancillary = 0, []
        if not size:
            self._over = True
            self._stay.end()
            return 0
        descriptors = array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)  # Linux cuts none in two
        try:
            if flags & _TRUNCATED:
                raise ValueError("it is too long")
            passed, is_whole = parse_passed(bytes(memoryview(self._buffer)[:size]), descriptors)
            if not is_whole and not flags & _DESCRIPTORS_CUT:
                raise ValueError("descriptors are missing")
        except ValueError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            _note_lost("node_protocol", str(error))
            return 1
        if not is_whole:
            _note_lost("few_descriptors", "this process has no descriptors left")
        for each in passed:
            try:
                self._take(each)
            except OSError as error:
                _note_lost("node_protocol", f"no connection: {error.strerror}")
            except Exception as error:  # noqa: BLE001  # it concerns this connection alone
                log_unforeseen(error)
        return len(passed) or 1


def _note_lost(event: str, why: str) -> None:
    _note(event, f"visitors that were passed on are lost: {why}", why)


def _note(event: str, line: str, why: str, *, peer: str | None = None) -> None:
    _log_limiter.log((event, peer), line, about=about(event, peer=peer, reason=why))

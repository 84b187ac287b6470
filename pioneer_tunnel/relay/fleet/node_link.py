"""The kept link to one other node: dialled when it is needed first, and again when it was lost.

A node has two processes while it is restarted: one that drains, and its successor, which has the address. The link to
the first one stays until it ends. When a session is in a process to which there is no link, the address is dialled, at
most once a second.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, final

import trio

from ..._model.errors import RemoteProtocolError, StorageError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._net.stream_link import StreamLink
from ..._net.streams import ByteStream
from ..._wire.messages import Message
from ...yamux import Limits, Role, SendBudget, YamuxConnection, YamuxStream
from .networks import Network, Reached
from .node_messages import GONE, LENGTH_SIZE, NODE, framed, length_of, parse_message

__all__ = ["HEARTBEAT", "LIMITS", "NodeLink", "greet", "receive_message"]

_Read = TypeVar("_Read")

HEARTBEAT: Final = 5.0
"""Seconds of silence after which a node is pinged."""

LIMITS: Final = Limits(streams=16 * 1024, unread=128 * 1024 * 1024, unsent=32 * 1024 * 1024)
"""Of each link. A link carries the visitors of many tunnels."""

DIAL_TIMEOUT: Final = 5.0
"""Seconds for dialling, TLS and the greeting."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds for the answer to a request: a suspended session makes a visitor wait for some of them."""

SHORTEST_BACKOFF: Final = 0.25
LONGEST_BACKOFF: Final = 5.0
"""Seconds before the next attempt, when one has failed. They double. For so long after a node or a network has come
back, and for as long as a dial that it has cut takes, visitors may get an error.
"""

LONGEST_WAIT: Final = 1.0
"""Seconds that a request waits for the next attempt. If that is later, the request fails at once."""

STEADY: Final = 10.0
"""Seconds that a link has to last, so that its loss is not one more failed attempt."""

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks whether another process has the address, while one is connected."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))


async def greet(stream: ByteStream, node: str, process: str) -> Message:
    """Say who this end is, and return what the other one says. The caller sets the deadline.

    Raises:
        RemoteProtocolError: that is no greeting.
        trio.BrokenResourceError: the connection broke.
    """
    await stream.send_all(framed({"type": NODE, "name": node, "process": process}))
    said = await receive_message(stream)
    if said.type != NODE:
        raise RemoteProtocolError("it does not greet as a node")
    return said


async def receive_message(stream: trio.abc.ReceiveStream) -> Message:
    """Receive one message, and no byte after it. The caller sets the deadline.

    Raises:
        RemoteProtocolError: it is malformed.
        trio.BrokenResourceError: the connection broke or ended.
    """
    return parse_message(await _exactly(stream, length_of(await _exactly(stream, LENGTH_SIZE))))


async def _exactly(stream: trio.abc.ReceiveStream, amount: int) -> bytes:
    received = b""
    while len(received) < amount:
        data = await stream.receive_some(amount - len(received))
        if not data:
            raise trio.BrokenResourceError("the other node ended the connection within a message")
        received += data
    return received


@final
class _Process:
    """A connected process of the other node."""

    def __init__(self, link: StreamLink, name: str, sending: SendBudget) -> None:
        self.name: Final = name
        self.connection: Final = YamuxConnection(
            link, Role.CLIENT, heartbeat=HEARTBEAT, limits=LIMITS, process_sending=sending
        )

    @property
    def takes_streams(self) -> bool:
        return self.connection.failure is None and not self.connection.session.openings_over


@final
class NodeLink:
    """The link to one node.

    Args:
        node: its name.
        own: the name of this node.
        process: tells this process from others of this node.
        network: the way there.
        sending: the budget of unsent bytes that all links share.
        tasks: the nursery of the links.
        random: spreads attempts.

    Attributes:
        round_trip: in seconds, the shortest of late; inf while none was measured, and while the node is not reached.
    """

    def __init__(
        self,
        node: str,
        *,
        own: str,
        process: str,
        network: Network,
        sending: SendBudget,
        tasks: trio.Nursery,
        random: random.Random,
    ) -> None:
        self._node: Final = node
        self._own: Final = own
        self._process: Final = process
        self._network: Final = network
        self._sending: Final = sending
        self._tasks: Final = tasks
        self._random: Final = random
        self._processes: Final[list[_Process]] = []  # the newest first
        self._dialling: trio.Event | None = None
        self._dialled_at = -math.inf
        self._failures = 0
        self._not_before = -math.inf
        self._why_not = ""

    @property
    def is_idle(self) -> bool:
        """Whether there is no link, and no task waits for one."""
        return not self._processes and self._dialling is None

    @property
    def round_trip(self) -> float:
        for process in self._processes:
            return process.connection.session.round_trips.shortest or math.inf
        return math.inf

    @property
    def streams_open(self) -> int:
        """Streams that this node has opened and that are open."""
        return sum(process.connection.session.streams_open for process in self._processes)

    def want(self) -> None:
        """Dial if there is no link, and no attempt has just failed. Does not wait."""
        if self.is_idle and trio.current_time() >= self._not_before:
            self._dial(None)

    async def ask(
        self, fields: Mapping[str, Any], read: Callable[[Message], _Read], *, process: str | None = None
    ) -> tuple[YamuxStream, _Read]:
        """Open a stream with a request, and wait for the answer.

        Args:
            fields: the request.
            read: called with the answer, which is not `gone`. When it raises, the stream is reset.
            process: which process of the node; None for the one that has its address now.

        Returns:
            The stream after the answer, and what `read` has returned.

        Raises:
            trio.BrokenResourceError: the process cannot be reached, has not what is asked for, or breaks the protocol.
        """
        with trio.move_on_after(ANSWER_TIMEOUT):
            found = self._find(process) or await self._dialled(process)
            stream = await found.connection.open_stream(announce=False)
            try:
                stream.put(framed(fields))
                answer = await receive_message(stream)
                if answer.type == GONE:
                    raise trio.BrokenResourceError(f"node {self._node} does not have it any more")
                return stream, read(answer)
            except RemoteProtocolError as error:
                stream.reset()
                raise trio.BrokenResourceError(f"node {self._node} breaks the protocol: {error}") from error
            except BaseException:
                stream.reset()
                raise
        raise trio.BrokenResourceError(f"node {self._node} did not answer within {ANSWER_TIMEOUT:g} seconds")

    def _find(self, process: str | None) -> _Process | None:
        for each in self._processes:
            if each.takes_streams and process in {None, each.name}:
                return each
        return None

    async def _dialled(self, process: str | None) -> _Process:
        """What `_find` does not find yet."""
        if self._dialling is None and trio.current_time() < self._not_before <= trio.current_time() + LONGEST_WAIT:
            await trio.sleep_until(self._not_before)
        if self._dialling is None:
            now = trio.current_time()
            if now < self._not_before:
                raise trio.BrokenResourceError(f"node {self._node} cannot be reached: {self._why_not}")
            if self._processes and now < self._dialled_at + LOOK_INTERVAL:
                raise trio.BrokenResourceError(f"that process of node {self._node} cannot be reached")
            self._dial(process)
        dialling = self._dialling
        assert dialling is not None
        await dialling.wait()
        found = self._find(process)
        if found is None:
            raise trio.BrokenResourceError(f"node {self._node} cannot be reached: {self._why_not or 'no more'}")
        return found

    def _dial(self, wanted: str | None) -> None:
        self._dialling, self._dialled_at = trio.Event(), trio.current_time()
        self._tasks.start_soon(self._keep, wanted, self._dialling)

    async def _keep(self, wanted: str | None, dialling: trio.Event) -> None:
        """Dial once, and run the link until it ends."""
        process = None
        try:
            process = await self._reach(wanted)
        finally:
            self._dialling = None
            dialling.set()
        if process is None:
            return
        since = trio.current_time()
        try:
            await process.connection.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError) as error:
            self._note(logging.INFO, "node_lost", "is lost", error)
        finally:
            self._processes.remove(process)
        if trio.current_time() < since + STEADY:
            self._back_off("the link was lost soon")

    async def _reach(self, wanted: str | None) -> _Process | None:
        """Dial. None if that failed, or if the process is one that is connected already."""
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                reached = await self._network.dial(self._node, wanted)
                try:
                    name = await self._greeted(reached)
                except BaseException:
                    await trio.aclose_forcefully(reached.stream)
                    raise
        except (
            OSError,
            StorageError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            RemoteProtocolError,
        ) as error:
            self._back_off(str(error))
            self._note(logging.WARNING, "node_unreachable", "cannot be reached", error)
            return None
        except trio.TooSlowError:
            self._back_off(f"no answer within {DIAL_TIMEOUT:g} seconds")
            self._note(logging.WARNING, "node_unreachable", "cannot be reached", trio.TooSlowError(self._why_not))
            return None
        if any(name == process.name and process.takes_streams for process in self._processes):
            await trio.aclose_forcefully(reached.stream)
            return None
        self._failures, self._why_not = 0, ""
        process = _Process(StreamLink(reached.stream, reached.watched), name, self._sending)
        self._processes.insert(0, process)
        self._note(logging.INFO, "node_connected", "is connected")
        return process

    async def _greeted(self, reached: Reached) -> str:
        said = await greet(reached.stream, self._own, self._process)
        if said.text("name") != self._node:
            raise trio.BrokenResourceError("another node is there")
        return said.text("process")

    def _back_off(self, why: str) -> None:
        delay = min(SHORTEST_BACKOFF * 2.0**self._failures, LONGEST_BACKOFF) * self._random.uniform(0.5, 1)
        self._failures = min(self._failures + 1, 16)
        self._not_before, self._why_not = trio.current_time() + delay, why

    def _note(self, level: int, event: str, what: str, why: Exception | None = None) -> None:
        line = f"node {self._node} {what}{'' if why is None else f': {why}'}"
        fields = about(event, peer=self._node, reason=why)
        _log_limiter.log((event, self._node), line, level=level, about=fields)

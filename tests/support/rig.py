"""A relay on loopback and the ways to it, for the tests of whatever stands around a relay."""

from __future__ import annotations

import atexit
import gc
import hashlib
import inspect
import os
import random
import socket
import struct
import sys
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import Any, Final, NoReturn, final

import attrs
import pytest
import trio
import trio.testing

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.relay import Relay, RelayAddresses, RelayConfig
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel
from pioneer_tunnel.websocket import EngineName

KEY: Final = RelayKey("ptk1_the-key-of-the-tests-0123456789abcdef")
HOST: Final = "office.test"
RELAY_NAME: Final = "relay.test"
AT_ONCE: Final = RestartPolicy(initial=0.01, maximum=0.05)

HANG: Final = 120.0
"""Seconds after which a test that waits for sockets, threads or processes counts as hung.

No test measures how fast the machine is: a busy machine may stop a process for seconds.
"""


def relay_config(**changes: Any) -> RelayConfig:
    """A relay with one tunnel, `HOST`, for gateways that dial `RELAY_NAME` with `KEY`, as often as they like."""
    fields: dict[str, Any] = {
        "control_addr": "127.0.0.1:0",
        "ingress_addr": "localhost:0",
        "id": "relay-of-the-tests",
        "public_names": [RELAY_NAME],
        "tunnels": [tunnel_entry()],
        "limits": {"connects_per_second_per_address": 0},
    }
    return RelayConfig(**(fields | changes))


def tunnel_entry(**changes: Any) -> dict[str, Any]:
    fields = {"id": "office", "url": f"http://{HOST}", "key": str(KEY.identity().public_key)}
    return fields | changes


@final
class RelayRig:
    """A relay that can be stopped and started again; gateways find it under one name wherever it listens."""

    def __init__(self, nursery: trio.Nursery, config: RelayConfig, engine: EngineName | None) -> None:
        self.config = config
        self.addresses: RelayAddresses
        self.relay: Relay
        self._nursery = nursery
        self._engine = engine
        self._running = trio.CancelScope()
        self._stopped = trio.Event()

    async def start(self) -> None:
        self.addresses = await self._nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        self._stopped = trio.Event()
        with trio.CancelScope() as self._running:
            self.relay = Relay(self.config, engine=self._engine)
            await self.relay.serve(task_status=task_status)
        self._stopped.set()

    async def apply(self, **changes: Any) -> None:
        """Let it take up a changed configuration while it runs."""
        self.config = attrs.evolve(self.config, **changes)
        self.addresses = await self.relay.apply(self.config)

    async def stop(self) -> None:
        self._running.cancel()
        await self._stopped.wait()

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        """The dialer of gateways."""
        return await connect(self.addresses.control)

    def tunnel(self, **changes: Any) -> AbstractAsyncContextManager[Tunnel]:
        settings: dict[str, Any] = {
            "relay": f"ws://{RELAY_NAME}",
            "key": KEY,
            "dial": self.dial,
            "restart": AT_ONCE,
            "connect_timeout": HANG,
            "websocket_engine": self._engine,
        }
        return open_tunnel(**(settings | changes))

    async def visit(self) -> trio.SocketStream:
        """Connect as a visitor."""
        return await connect(self.addresses.ingress)


@asynccontextmanager
async def relay_rig(engine: EngineName | None = None, **changes: Any) -> AsyncIterator[RelayRig]:
    async with trio.open_nursery() as nursery:
        rig = RelayRig(nursery, relay_config(**changes), engine)
        await rig.start()
        yield rig
        await rig.stop()


async def connect(address: Address) -> trio.SocketStream:
    """Connect before the relay, which is in this process, can reset the connection."""
    await trio.lowlevel.checkpoint()
    connected = socket.create_connection(("127.0.0.1", address.port), HANG)
    connected.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(connected))


@contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets; the first one does not block."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def request(*lines: str, host: str = HOST, body: bytes = b"") -> bytes:
    if body:
        lines += (f"Content-Length: {len(body)}",)
    return "\r\n".join(["GET / HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode() + body


def upload(host: str = HOST) -> bytes:
    """A request whose body does not end, so that whatever a test says next belongs to it."""
    return request(f"Content-Length: {10**12}", host=host)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end; a reset raises `trio.BrokenResourceError`."""
    received = bytearray()
    while data := await stream.receive_some(64 * 1024):
        received += data
    return bytes(received)


async def read_exactly(stream: trio.abc.ReceiveStream, amount: int) -> bytes:
    received = bytearray()
    while len(received) < amount:
        data = await stream.receive_some(amount - len(received))
        assert data, f"the stream ended after {len(received)} of {amount} bytes"
        received += data
    return bytes(received)


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = await stream.receive_some(1)
        assert data, f"the stream ended after {received!r}"
        received += data
    return received


async def carried(source: trio.abc.HalfCloseableStream, sink: trio.abc.ReceiveStream, data: bytes) -> bytes:
    """Send `data` and the end into `source`; returns all that comes out of `sink`."""
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await source.send_all(data)
            await source.send_eof()

        return await read_all(sink)


async def talk(visit: Callable[[], Awaitable[trio.SocketStream]], amount: int, seed: int = 0) -> None:
    """Visit a gateway that sends back what comes, with a body of so many random bytes, and compare."""
    sent = request(body=random.Random(seed).randbytes(amount))
    async with await visit() as visitor:
        received = await carried(visitor, visitor, sent)
    assert len(received) == len(sent)
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


async def until_it_raises(receive: Callable[[], Awaitable[object]]) -> NoReturn:
    """Call `receive` again and again; the caller expects it to raise before long."""
    while True:
        await receive()


async def ask(stream: trio.abc.Stream, data: bytes) -> bytes:
    """Send `data`, end, and read the whole answer."""
    await stream.send_all(data)
    assert isinstance(stream, trio.abc.HalfCloseableStream)
    await stream.send_eof()
    return await read_all(stream)


async def echo(stream: TunnelStream) -> None:
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


@asynccontextmanager
async def in_background(*tasks: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `tasks` meanwhile, and cancel them at the end."""
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        yield
        nursery.cancel_scope.cancel()


def seeds(number: int, *, quick: int) -> pytest.MarkDecorator:
    """Run a test with so many seeds: `quick` of them in `make test`, all in `make test-all`."""
    more = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, number)]
    return pytest.mark.parametrize("seed", [*range(quick), *more])


def no_hang() -> AbstractContextManager[trio.CancelScope]:
    """Fail when the block hangs. For tests that run by the real clock; virtual time needs no bound."""
    return trio.fail_after(HANG)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition`, which may be async, holds."""
    with no_hang():
        while True:
            held = condition()
            if inspect.isawaitable(held):
                held = await held
            if held:
                return
            await trio.sleep(0.002)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds, where no Trio runs."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)


async def run_until_it_waits(work: Callable[[], Awaitable[object]]) -> None:
    """Run `work` until it waits, for nothing that is on its way, and cancel it then."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def tcp_pair(buffers: int | None = None) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a TCP connection, with so many bytes asked for each buffer, or as the system has it."""
    with trio.socket.socket() as listener:
        near = trio.socket.socket()
        for sock in (listener, near):
            if buffers is not None:  # before they connect: a buffer does not take back what it has offered its peer
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        await near.connect(listener.getsockname())
        far, _ = await listener.accept()
    return trio.SocketStream(near), trio.SocketStream(far)


async def fill(stream: trio.SocketStream) -> None:
    """Send on a TCP connection whose peer reads nothing, until no byte fits any more."""
    while True:
        at_rest = _is_at_rest(stream)
        try:
            os.write(stream.socket.fileno(), bytes(1_000_000))
        except BlockingIOError:
            if at_rest:
                return
            await trio.sleep(0.001)  # what the system hands over meanwhile makes room


def _is_at_rest(stream: trio.SocketStream) -> bool:
    """Whether nothing is on its way, and the peer has room for nothing; known on Linux alone."""
    if sys.platform != "linux":
        return True
    info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    (on_the_way,), (window,) = struct.unpack_from("I", info, 24), struct.unpack_from("I", info, 228)
    return not on_the_way and not window


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else takes before the test does.

    It is not among those that the system gives to whoever asks for any port, and no other test has it.
    """
    return free_ports(1)


def free_ports(amount: int) -> int:
    """The first of so many ports like that, one after the other."""
    while True:
        first = random.randrange(10_000, 32_000)
        reserved: list[socket.socket] = []
        try:
            for port in range(first, first + amount):
                reserved.append(socket.socket(socket.AF_UNIX))
                atexit.register(reserved[-1].close)
                with socket.socket() as probe:
                    if sys.platform == "linux":
                        reserved[-1].bind(f"\0pioneer-tunnel-tests-{port}")  # until this process ends
                    probe.bind(("127.0.0.1", port))
        except OSError:
            for one in reserved:
                one.close()
        else:
            return first


async def rejected(tunnel: Tunnel) -> None:
    """Wait until the relay has rejected the key of a tunnel that was up before: that is retried after 15 minutes."""
    async for status in tunnel.watch():
        if status.error_kind is ErrorKind.TUNNEL_AUTH_FAILED:
            assert status.state is State.FAILED
            assert status.retry_at_unix is not None
            return


def open_sockets() -> set[str]:
    """The sockets of this process."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
        if target.startswith("socket:"):
            found.add(target)
    return found


def only_looks(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call of `os` finds the way to a file, and opens nothing to read or write."""
    return name == "open" and bool(arguments[1] & getattr(os, "O_PATH", 0))


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fail when the block leaves a task or a socket behind."""
    gc.collect()
    tasks, sockets = living_tasks(), open_sockets()
    yield
    assert living_tasks() == tasks, "tasks were left behind"
    assert open_sockets() <= sockets, "sockets were left behind"


class Held:
    """Something that a frame holds, and that a test can hold weakly."""


async def raise_again_and_again(raises: Callable[[], Awaitable[object]], error: type[BaseException]) -> None:
    """Check that 1,000 calls raise equal errors, with tracebacks of one length, and keep no caller's frame alive."""

    async def call() -> tuple[int, tuple[Any, ...], weakref.ref[Held]]:
        held = Held()
        try:
            await raises()
        except error as caught:
            return len(traceback.extract_tb(caught.__traceback__)), caught.args, weakref.ref(held)
        raise AssertionError("it did not raise")

    heard = [await call() for _ in range(1000)]
    # Trio holds what has woken a task until its next step, and since Python 3.12 the traceback in it holds all frames.
    await trio.lowlevel.checkpoint()
    gc.collect()
    assert len({(frames, arguments) for frames, arguments, _ in heard}) == 1
    assert not any(held() for _, _, held in heard)

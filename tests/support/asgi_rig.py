"""An ASGI application behind a real tunnel, on each async library, and visitors who speak HTTP byte by byte."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias, final

import anyio
import attrs
import h11
import trio
from rig import AT_ONCE, HANG, HOST, KEY, RELAY_NAME, connect, no_hang, relay_rig, tunnel_entry

from pioneer_tunnel import Certificate, aio, asgi
from pioneer_tunnel.asgi.interface import AsgiApp, Receive, Scope, Send
from pioneer_tunnel.tunnel.tunnel import open_tunnel

Face: TypeAlias = Literal["trio", "asyncio"]
FACES: Final[tuple[Face, ...]] = ("trio", "asyncio")


@final
@attrs.define
class Served:
    """An application that is being served.

    Attributes:
        visit: connects as a visitor, past the relay's own reading of HTTP.
        stop: begins the graceful stop.
        cancel: cancels `serve`.
        errors: what `serve` has raised.
        ended: set when `serve` has ended.
    """

    visit: Callable[[], Any]
    stop: Callable[[], object]
    cancel: Callable[[], object]
    errors: list[BaseException] = attrs.field(factory=list)
    ended: threading.Event = attrs.field(factory=threading.Event)


@asynccontextmanager
async def serving(
    app: AsgiApp, face: Face, *, lifespan: Any = "auto", certificate: Certificate | None = None, **options: Any
) -> AsyncIterator[Served]:
    """Serve `app`; at the end of the block, cancel it and wait for the end."""
    limits = asgi.Options(**({"graceful_timeout": HANG, "keep_alive_timeout": HANG, "head_timeout": HANG} | options))
    entry = tunnel_entry(bind_addr="127.0.0.1:0")
    with no_hang():
        async with relay_rig(tunnels=[entry]) as rig, trio.open_nursery() as nursery:

            async def visit() -> trio.SocketStream:
                return await connect(rig.addresses.tunnels["office"])

            arguments = {"options": limits, "lifespan": lifespan, "certificate": certificate}
            run = _serve_on_trio if face == "trio" else _serve_on_asyncio
            served = await nursery.start(run, app, visit, rig.dial, arguments)
            try:
                yield served
            finally:
                served.cancel()
                with trio.CancelScope(shield=True):
                    await in_thread(served.ended)


async def _serve_on_trio(
    app: AsgiApp, visit: Any, dial: Any, arguments: dict[str, Any], *, task_status: trio.TaskStatus[Served]
) -> None:
    stop = trio.Event()
    scope = trio.CancelScope()
    served = Served(visit, stop.set, scope.cancel)
    try:
        with scope:
            async with open_tunnel(f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE) as tunnel:
                await tunnel.wait_connected()
                task_status.started(served)
                await asgi.serve(app, tunnel, **arguments, shutdown_trigger=stop.wait)
    except Exception as error:  # noqa: BLE001  # for the test
        served.errors.append(error)
    finally:
        served.ended.set()


async def _serve_on_asyncio(
    app: AsgiApp, visit: Any, dial: Any, arguments: dict[str, Any], *, task_status: trio.TaskStatus[Served]
) -> None:
    up = threading.Event()
    found: list[Served] = []

    async def main() -> None:
        loop, stop, task = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
        assert task is not None
        served = Served(
            visit, lambda: loop.call_soon_threadsafe(stop.set), lambda: loop.call_soon_threadsafe(task.cancel)
        )
        found.append(served)
        try:
            async with aio.open_tunnel(f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE) as tunnel:
                await tunnel.wait_connected()
                up.set()
                await aio.serve(app, tunnel, **arguments, shutdown_trigger=stop.wait)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001  # for the test
            served.errors.append(error)
        finally:
            up.set()

    def run() -> None:
        try:
            asyncio.run(main(), debug=True)
        finally:
            served = found[0]
            served.cancel = lambda: None
            served.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, run)
        await in_thread(up)
        task_status.started(found[0])


async def in_thread(flag: threading.Event) -> None:
    """Wait for a flag of another thread."""
    while not flag.is_set():
        await trio.sleep(0.001)


async def until(flag: threading.Event) -> None:
    """The same for an application, on whatever library it runs."""
    while not flag.is_set():
        await anyio.sleep(0.001)


@final
class Browser:
    """A visitor who reads answers by h11."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: Final = stream
        self._protocol = h11.Connection(h11.CLIENT)
        self._rest = b""

    async def ask(self, method: str = "GET", target: str = "/", *lines: str, body: bytes = b"") -> Answer:
        """Send a request and read the answer."""
        await self.stream.send_all(head(method, target, *lines) + body)
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> Answer:
        """Read the next answer."""
        self._protocol = h11.Connection(h11.CLIENT)
        self._protocol.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        self._protocol.send(h11.EndOfMessage())
        if self._rest:
            self._protocol.receive_data(self._rest)
        informed: list[int] = []
        status, headers, trailers = 0, [], []
        body = bytearray()
        while True:
            event: Any = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(bytes(await self.stream.receive_some(64 * 1024)))
            elif isinstance(event, h11.InformationalResponse):
                informed.append(event.status_code)
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, [*event.headers]
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                trailers = [*event.headers]
                break
            else:
                raise AssertionError(f"no answer, but {event}")
        self._rest = self._protocol.trailing_data[0]
        return Answer(status, dict(headers), bytes(body), dict(trailers), informed)


@final
@attrs.frozen
class Answer:
    """An answer, and the informational ones before it."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    trailers: dict[bytes, bytes]
    informed: list[int]


def head(method: str, target: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {HOST}", *lines, "", ""]).encode()


async def read_body(receive: Receive) -> bytes:
    """The body of a request, for an application."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("the visitor has gone")
        body += message["body"]
        more = message["more_body"]
    return bytes(body)


async def respond(send: Send, body: bytes = b"", status: int = 200, headers: list[Any] | None = None) -> None:
    """Answer, for an application."""
    await send({"type": "http.response.start", "status": status, "headers": headers or []})
    await send({"type": "http.response.body", "body": body})


async def no_lifespan(scope: Scope) -> None:
    """The first line of an application without lifespan."""
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body of the request."""
    await no_lifespan(scope)
    await respond(send, await read_body(receive))

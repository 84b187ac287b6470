"""A relay is restarted under load, with real processes: what visitors notice of it.

    python tests/support/restart_trial.py          # 50 requests/s and 12 downloads of 20 s

Visitors are steady requests with a connection each, requests on connections that stay open, and downloads whose bytes
are hashed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, final

import attrs
import trio
from programs import Relay, relay_in, running

CHUNK: Final = b"0123456789abcdef" * 64
INTERVAL: Final = 0.05
PATIENCE: Final = 20.0


@final
@attrs.frozen(kw_only=True)
class Load:
    """What visitors do, and when the relay is restarted.

    Attributes:
        rate: requests per second, each with a connection of its own.
        kept: connections with a request every 100 ms.
        downloads: how many there are, from the beginning on.
        seconds: that each of them takes.
        before: seconds before each restart.
        restarts: how many there are.
    """

    rate: float
    kept: int
    downloads: int
    seconds: float
    before: float
    restarts: int = 1


@final
@attrs.define
class Figures:
    """What the visitors saw."""

    requests: int = 0
    failed: list[str] = attrs.field(factory=list)
    kept: int = 0
    kept_failed: list[str] = attrs.field(factory=list)
    downloads: int = 0
    downloads_failed: list[str] = attrs.field(factory=list)
    slowest: float = 0.0


async def serve_local(stream: trio.SocketStream) -> None:
    """The gateway's local server: `/slow/N` takes N seconds; it keeps connections."""
    async with stream:
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                received += data
                while b"\r\n\r\n" in received:
                    head, _, received = received.partition(b"\r\n\r\n")
                    await answer(stream, head.split()[1].decode())


async def answer(stream: trio.SocketStream, path: str) -> None:
    slow = re.fullmatch(r"/slow/([\d.]+)", path)
    if slow is None:
        body = f"hello from {path}".encode()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return
    chunks = round(float(slow[1]) / INTERVAL)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (chunks * len(CHUNK)))
    for _ in range(chunks):
        await stream.send_all(CHUNK)
        await trio.sleep(INTERVAL)


async def ask(stream: trio.SocketStream, path: str) -> bytes:
    """One request; returns the body of the response, as long as its length says."""
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: office.test\r\n\r\n".encode())
    received = b""
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some()
        if not data:
            raise EOFError(received.decode())
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    assert b" 200 " in head, head
    while len(body) < int(length[1]):
        data = await stream.receive_some()
        if not data:
            raise EOFError(f"after {len(body)} of {int(length[1])} bytes")
        body += data
    return body


@final
class Trial:
    def __init__(self, ingress: int) -> None:
        self.ingress: Final = ingress
        self.figures: Final = Figures()
        self.stopping = False

    async def request(self, number: int) -> None:
        self.figures.requests += 1
        began = trio.current_time()
        try:
            with trio.fail_after(PATIENCE):
                async with await trio.open_tcp_stream("127.0.0.1", self.ingress) as stream:
                    assert await ask(stream, f"/{number}") == f"hello from /{number}".encode()
        except Exception as error:  # noqa: BLE001
            self.figures.failed.append(f"{number} after {trio.current_time() - began:.3f} s: {error!r}")
        self.figures.slowest = max(self.figures.slowest, trio.current_time() - began)

    async def request_steadily(self, rate: float, nursery: trio.Nursery) -> None:
        began = trio.current_time()
        number = 0
        while not self.stopping:
            nursery.start_soon(self.request, number)
            number += 1
            await trio.sleep_until(began + number / rate)

    async def keep_connection(self, number: int) -> None:
        """Requests on one connection. As HTTP libraries do, use another one when it was closed while it was idle."""
        stream: trio.SocketStream | None = None
        while not self.stopping:
            self.figures.kept += 1
            try:
                with trio.fail_after(PATIENCE):
                    if stream is not None and stream.socket.is_readable():
                        await stream.aclose()
                        stream = None
                    try:
                        body = None if stream is None else await ask(stream, f"/kept/{number}")
                    except EOFError as error:
                        if stream is None or str(error):
                            raise
                        await stream.aclose()
                        body = None  # it was closed while it was idle: a client asks again (RFC 9110, 9.2.2)
                    if body is None:
                        stream = await trio.open_tcp_stream("127.0.0.1", self.ingress)
                        body = await ask(stream, f"/kept/{number}")
                    assert body == f"hello from /kept/{number}".encode()
            except Exception as error:  # noqa: BLE001
                self.figures.kept_failed.append(repr(error))
                if stream is not None:
                    await trio.aclose_forcefully(stream)
                stream = None
            await trio.sleep(0.1)
        if stream is not None:
            await stream.aclose()

    async def download(self, seconds: float) -> None:
        self.figures.downloads += 1
        whole = hashlib.sha256(CHUNK * round(seconds / INTERVAL)).digest()
        try:
            async with await trio.open_tcp_stream("127.0.0.1", self.ingress) as stream:
                body = await ask(stream, f"/slow/{seconds}")
                assert hashlib.sha256(body).digest() == whole
        except Exception as error:  # noqa: BLE001
            self.figures.downloads_failed.append(repr(error))


async def restart_under_load(relay: Relay, load: Load) -> Figures:
    """Load a relay while it is restarted. The last process is ended."""
    serving = relay.program.process.pid

    async def restart(number: int) -> None:
        nonlocal serving
        os.kill(serving, signal.SIGUSR2)
        said = rf"(?s)(?:the successor, process (\d+), listens.*?){{{number}}}"
        found = await trio.to_thread.run_sync(relay.program.wait_for, said)
        serving = int(found[1])

    figures = await disturb_under_load(relay, load, restart)
    os.kill(serving, signal.SIGTERM)
    await trio.to_thread.run_sync(relay.program.finish)  # all of them share its standard error
    return figures


async def disturb_under_load(relay: Relay, load: Load, disturb: Callable[[int], Awaitable[object]]) -> Figures:
    """Load a relay, and call `disturb` as often as `load.restarts` says, with the number of the time, from 1."""
    trial = Trial(relay.ingress)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, serve_local, 0, host="127.0.0.1"))
        local = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        with running("expose", local, "--relay", relay.url, "--key-file", relay.folder / "key") as gateway:
            await trio.to_thread.run_sync(gateway.wait_for, "connected .*http://office.test")
            async with trio.open_nursery() as visitors:
                for _ in range(load.downloads):
                    visitors.start_soon(trial.download, load.seconds)
                for number in range(load.kept):
                    visitors.start_soon(trial.keep_connection, number)
                visitors.start_soon(trial.request_steadily, load.rate, visitors)
                for number in range(1, load.restarts + 1):
                    await trio.sleep(load.before)
                    await disturb(number)
                await trio.sleep(max(load.seconds - load.before * load.restarts, 0) + 2)
                trial.stopping = True
            await trio.to_thread.run_sync(gateway.interrupt, signal.SIGTERM)
        nursery.cancel_scope.cancel()
    return trial.figures


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, relay_in(Path(folder)) as relay:

        async def run() -> None:
            figures = await restart_under_load(relay, Load(rate=50, kept=10, downloads=12, seconds=20.0, before=5.0))
            print(figures)

        trio.run(run)


if __name__ == "__main__":
    main()

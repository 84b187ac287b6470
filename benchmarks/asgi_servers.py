"""Requests a second of an ASGI application behind the tunnel: served by it, or by another server and forwarded.

    python -m benchmarks.asgi_servers [--rounds 3] [--seconds 3] [--connections 16]

The relay, the server and the visitors are processes of their own, on loopback. Rounds take turns, so that a busy moment
hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any, Final

import attrs
import trio

from pioneer_tunnel import RelayKey, aio, asgi, forward, new_relay_key, open_tunnel
from pioneer_tunnel.relay import Relay, RelayConfig

from .processes import Process

HOST: Final = "bench.test"
REQUEST: Final = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
BODY: Final = b"hello"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers each request with five bytes."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


async def _asgi(relay: str, key: RelayKey, _port: int) -> None:
    async with open_tunnel(relay, key=key) as tunnel:
        await asgi.serve(app, tunnel)


async def _hypercorn(relay: str, key: RelayKey, port: int) -> None:
    from hypercorn.config import Config
    from hypercorn.trio import serve

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    async with open_tunnel(relay, key=key) as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(serve, app, config)
        await trio.serve_listeners(functools.partial(forward, local=f"127.0.0.1:{port}"), [tunnel])


async def _aio(relay: str, key: RelayKey, _port: int) -> None:
    async with aio.open_tunnel(relay, key=key) as tunnel:
        await aio.serve(app, tunnel)


async def _uvicorn(relay: str, key: RelayKey, port: int) -> None:
    import uvicorn

    async with aio.open_tunnel(relay, key=key, forward_to=f"127.0.0.1:{port}"):
        await uvicorn.Server(uvicorn.Config(app, port=port, http="h11", log_level="error", access_log=False)).serve()


SERVERS: Final[dict[str, tuple[bool, Callable[[str, RelayKey, int], Awaitable[None]]]]] = {
    "asgi.serve": (True, _asgi),
    "hypercorn's Trio worker, forwarded": (True, _hypercorn),
    "aio.serve": (False, _aio),
    "uvicorn with h11, forwarded": (False, _uvicorn),
}
"""For each server, whether it runs on Trio."""


async def _relay(key: RelayKey, port: int) -> None:
    entry = {"id": "bench", "url": f"http://{HOST}", "key": str(key.identity().public_key)}
    bind = {"bind_addr": f"127.0.0.1:{port + 1}"}
    control = f"127.0.0.1:{port}"
    config = RelayConfig(
        control_addr=control,
        ingress_addr=f"127.0.0.1:{port + 3}",
        id="bench",
        public_names=[control],
        tunnels=[entry | bind],
    )
    await Relay(config).serve()


async def _visit(port: int, until: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.perf_counter() < until:
        writer.write(REQUEST)
        await reader.readuntil(BODY)
        count += 1
    writer.close()
    return count


async def _load(port: int, connections: int, seconds: float) -> float:
    began = time.perf_counter()
    counts = await asyncio.gather(*[_visit(port, began + seconds) for _ in range(connections)])
    return sum(counts) / (time.perf_counter() - began)


def _wait_up(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            asyncio.run(_load(port, 1, 0.1))
        except (OSError, asyncio.IncompleteReadError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def measure(name: str, port: int, connections: int, seconds: float) -> tuple[float, float]:
    """Requests a second, and microseconds of processor time that a request costs in the server's process."""
    key = new_relay_key()

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.asgi_servers", *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    processes = [start("--run", what, "--port", str(port)) for what in ("relay", name)]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(key.reveal().encode())
            process.stdin.close()
        _wait_up(port + 1)
        server = Process(processes[1].pid)
        before = server.cpu
        rate = asyncio.run(_load(port + 1, connections, seconds))
        return rate, (server.cpu - before) / (rate * seconds) * 1e6
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run(what: str, port: int) -> None:
    key = RelayKey(sys.stdin.read())
    if what == "relay":
        trio.run(_relay, key, port)
        return
    on_trio, serve = SERVERS[what]
    work = functools.partial(serve, f"ws://127.0.0.1:{port}", key, port + 2)
    if on_trio:
        trio.run(work)
    else:
        asyncio.run(work())  # type: ignore[arg-type]  # it is a coroutine


@attrs.define
class _Result:
    rates: list[float] = attrs.field(factory=list)
    costs: list[float] = attrs.field(factory=list)


def main() -> None:
    """Measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--port", type=int, default=17400)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        _run(options.run, options.port)
        return
    results = {name: _Result() for name in SERVERS}
    for turn in range(options.rounds):
        for number, (name, result) in enumerate(results.items()):
            port = options.port + 10 * (turn * len(SERVERS) + number)
            rate, cost = measure(name, port, options.connections, options.seconds)
            result.rates.append(rate)
            result.costs.append(cost)
    print("| server | requests/s | CPU µs a request |\n|---|--:|--:|")
    for name, result in results.items():
        print(f"| {name} | {median(result.rates):.0f} | {median(result.costs):.0f} |")


if __name__ == "__main__":
    main()

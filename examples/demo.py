"""A relay, a gateway, a tunnel and visitors on this machine, in some seconds.

A relay runs in a process of its own. A gateway that requires a bearer token listens on loopback. A tunnel makes the
gateway reachable at the relay's public address, where visitors connect. Then the demo cuts the link, and the tunnel
reconnects. `make demo` runs this.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below shows no traceback

import functools
import hashlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import attrs
import h11
import trio
from small_gateway import PIECE, Gateway
from trio_websocket import wrap_client_stream

from pioneer_tunnel import (
    Address,
    RelayKey,
    RestartPolicy,
    State,
    Tunnel,
    dial_tcp,
    forward,
    new_relay_key,
    open_tunnel,
)

TOKEN = "correct-horse-battery-staple"  # noqa: S105  # the demo's own
HOST = "gateway.localhost"
DOWNLOAD = 32 * 1024 * 1024
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.2f} s  {text}", flush=True)


@attrs.define
class Network:
    """The TCP connection between gateway and relay, which `cut` breaks."""

    link: trio.SocketStream | None = None

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        self.link = await dial_tcp(host, port)
        return self.link

    def cut(self) -> None:
        assert self.link is not None
        self.link.socket.shutdown(trio.socket.SHUT_RDWR)


def start_relay(folder: Path, key: RelayKey) -> tuple[Popen[str], Address, Address]:
    """Run the relay program; returns the process, the address for gateways and the address for visitors."""
    control, ingress = (Address("127.0.0.1", free_port()) for _ in range(2))
    config = folder / "relay.toml"
    config.write_text(
        f"""
        [relay]
        id = "demo-relay"
        control_addr = "{control}"
        ingress_addr = "{ingress}"
        public_names = ["{control}"]

        [[relay.tunnels]]
        id = "demo"
        url = "http://{HOST}:{ingress.port}"
        key = "{key.identity().public_key}"
        """
    )
    command = [sys.executable, "-m", "pioneer_tunnel", "relay", "--config", str(config)]
    return Popen(command, stderr=subprocess.DEVNULL, text=True), control, ingress  # noqa: S603  # our own program


async def wait_until_listening(address: Address) -> None:
    with trio.fail_after(60):
        while True:
            try:
                await trio.aclose_forcefully(await dial_tcp(address.host, address.port))
            except OSError:
                await trio.sleep(0.05)
            else:
                return


def free_port() -> int:
    """A free port outside the range from which the system picks a port for port 0."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311  # no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def get(ingress: Address, target: str, *, token: str | None) -> tuple[int, int, str]:
    """Send a visitor's request to the public address; returns status, size and SHA-256 of the body."""
    headers = [("Host", HOST)] + ([("Authorization", f"Bearer {token}")] if token else [])
    http = h11.Connection(h11.CLIENT)
    digest, size, status = hashlib.sha256(), 0, 0
    async with await dial_tcp(ingress.host, ingress.port) as stream:
        await stream.send_all(http.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        await stream.send_all(http.send(h11.EndOfMessage()) or b"")
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(256 * 1024))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                digest.update(event.data)
                size += len(event.data)
            else:
                return status, size, digest.hexdigest()


async def echo_over_websocket(ingress: Address) -> str | bytes:
    """Open a visitor's WebSocket at the public address, send a message and return the answer."""
    stream = await dial_tcp(ingress.host, ingress.port)
    headers = [(b"Authorization", f"Bearer {TOKEN}".encode())]
    async with stream, trio.open_nursery() as nursery:
        websocket = await wrap_client_stream(nursery, stream, HOST, "/echo", extra_headers=headers)
        await websocket.send_message("is anybody there?")
        answer = await websocket.get_message()
        await websocket.aclose()
        return answer


async def show_statuses(tunnel: Tunnel, seen: list[State]) -> None:
    async for status in tunnel.watch():
        if not seen or seen[-1] is not status.state:
            seen.append(status.state)
            say(f"    status: {status.state}{f' ({status.message})' if status.message else ''}")


async def visit(ingress: Address) -> None:
    """Make all requests of this demo, and check the answers."""
    status, _, _ = await get(ingress, "/hello", token=TOKEN)
    say(f"a visitor with the token gets {status}")
    assert status == 200
    status, _, _ = await get(ingress, "/hello", token=None)
    say(f"a visitor without gets {status}")
    assert status == 401
    began = time.perf_counter()
    _, size, digest = await get(ingress, f"/download?n={DOWNLOAD}", token=TOKEN)
    rate = size / (time.perf_counter() - began) / 1e6
    assert digest == hashlib.sha256(PIECE * (DOWNLOAD // len(PIECE))).hexdigest()
    say(f"a visitor downloads {size >> 20} MiB at {rate:.0f} MB/s, and its SHA-256 is right")
    answer = await echo_over_websocket(ingress)
    assert answer == "is anybody there?"
    say(f"a visitor's WebSocket hears its echo: {answer!r}")


async def demo(folder: Path) -> None:
    key = new_relay_key()
    relay, control, ingress = start_relay(folder, key)
    say(f"a relay runs as process {relay.pid}: gateways come to {control}, visitors to {ingress}")
    visitors: set[str] = set()
    gateway = Gateway(TOKEN, lambda visitor, _: visitors.add(visitor.host if visitor else "nobody knows where"))
    network = Network()
    seen: list[State] = []
    try:
        await wait_until_listening(ingress)
        async with trio.open_nursery() as nursery:
            listener: trio.SocketListener
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, gateway.serve, 0, host="127.0.0.1"))
            local = Address(*listener.socket.getsockname())
            say(f"a gateway that asks for a token listens on {local}, and expects the PROXY protocol")
            async with open_tunnel(
                f"ws://{control}", key=key, dial=network.dial, restart=RestartPolicy(initial=0.2)
            ) as tunnel:
                nursery.start_soon(show_statuses, tunnel, seen)
                handler = functools.partial(forward, local=local, proxy_protocol="v2")
                nursery.start_soon(trio.serve_listeners, handler, [tunnel])
                with trio.fail_after(60):
                    await tunnel.wait_connected()
                await visit(ingress)
                say("now somebody cuts the link")
                network.cut()
                with trio.fail_after(60):
                    while seen[-2:] != [State.RECONNECTING, State.CONNECTED]:
                        await trio.sleep(0.01)
                status, _, _ = await get(ingress, "/hello", token=TOKEN)
                say(f"a visitor gets {status} again")
                assert status == 200
                nursery.cancel_scope.cancel()
    finally:
        relay.terminate()
        relay.wait(10)
    say(f"the gateway saw its visitors come from {', '.join(sorted(visitors))}, as the PROXY header told")
    say(f"statuses: {', '.join(seen)}; the relay ended with exit status {relay.returncode}")


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on the demo removes what it made
        with tempfile.TemporaryDirectory() as folder:
            trio.run(demo, Path(folder))
    except* KeyboardInterrupt:
        sys.exit(130)

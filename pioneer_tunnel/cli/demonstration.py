"""What `demo` shows: a relay, a gateway, a tunnel and visitors on this machine, in some seconds.

A relay runs in a process of its own. A tunnel makes an ASGI application that requires a bearer token reachable at the
relay's public address, where visitors connect. Then the link is cut, and the tunnel reconnects.
"""

from __future__ import annotations

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
from typing import Final

import attrs
import click
import h11
import trio
from trio_websocket import wrap_client_stream

from .._model.addresses import Address
from .._model.keys import RelayKey, new_relay_key
from .._model.status import State
from .._net.dialing import dial_tcp
from ..asgi import serve
from ..asgi.interface import Receive, Scope, Send
from ..tunnel.restart_policy import RestartPolicy
from ..tunnel.tunnel import Tunnel, open_tunnel

__all__ = ["demonstrate"]

_TOKEN: Final = "correct-horse-battery-staple"  # noqa: S105  # the demo's own
_HOST: Final = "gateway.localhost"
_DOWNLOAD: Final = 32 * 1024 * 1024
_STARTED: Final = time.monotonic()
_PIECE: Final = bytes(range(256)) * 256


def say(text: str) -> None:
    click.echo(f"{time.monotonic() - _STARTED:6.2f} s  {text}")


@attrs.define
class Application:
    """An ASGI application: `/hello`, `/download`, and a WebSocket that echoes a message.

    Attributes:
        visitors: where its visitors came from, as the relay attests it.
    """

    visitors: set[str] = attrs.field(factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            return
        self.visitors.add(scope["client"][0] if scope["client"] else "nobody knows where")
        known = [value for name, value in scope["headers"] if name == b"authorization"] == [f"Bearer {_TOKEN}".encode()]
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"} if known else {"type": "websocket.close"})
            message = await receive()
            await send({"type": "websocket.send", "text": message.get("text")})
            await receive()
            return
        pieces = [b"hello\n"] if known else [b"who are you?\n"]
        if known and scope["path"] == "/download":
            pieces = [_PIECE] * (_DOWNLOAD // len(_PIECE))
        length = str(sum(map(len, pieces))).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200 if known else 401, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


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
        url = "http://{_HOST}:{ingress.port}"
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
    headers = [("Host", _HOST)] + ([("Authorization", f"Bearer {token}")] if token else [])
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
    headers = [(b"Authorization", f"Bearer {_TOKEN}".encode())]
    async with stream, trio.open_nursery() as nursery:
        websocket = await wrap_client_stream(nursery, stream, _HOST, "/echo", extra_headers=headers)
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
    status, _, _ = await get(ingress, "/hello", token=_TOKEN)
    say(f"a visitor with the token gets {status}")
    assert status == 200
    status, _, _ = await get(ingress, "/hello", token=None)
    say(f"a visitor without gets {status}")
    assert status == 401
    began = time.perf_counter()
    _, size, digest = await get(ingress, "/download", token=_TOKEN)
    rate = size / (time.perf_counter() - began) / 1e6
    assert digest == hashlib.sha256(_PIECE * (_DOWNLOAD // len(_PIECE))).hexdigest()
    say(f"a visitor downloads {size >> 20} MiB at {rate:.0f} MB/s, and its SHA-256 is right")
    answer = await echo_over_websocket(ingress)
    assert answer == "is anybody there?"
    say(f"a visitor's WebSocket hears its echo: {answer!r}")


async def demo(folder: Path) -> None:
    key = new_relay_key()
    relay, control, ingress = start_relay(folder, key)
    say(f"a relay runs as process {relay.pid}: gateways come to {control}, visitors to {ingress}")
    application = Application()
    network = Network()
    seen: list[State] = []
    try:
        await wait_until_listening(ingress)
        async with (
            trio.open_nursery() as nursery,
            open_tunnel(f"ws://{control}", key=key, dial=network.dial, restart=RestartPolicy(initial=0.2)) as tunnel,
        ):
            nursery.start_soon(show_statuses, tunnel, seen)
            nursery.start_soon(serve, application, tunnel)
            with trio.fail_after(60):
                await tunnel.wait_connected()
            say(f"a gateway in this process asks for a token; visitors come in at {tunnel.status.public_url}")
            await visit(ingress)
            say("now somebody cuts the link")
            network.cut()
            with trio.fail_after(60):
                while seen[-2:] != [State.RECONNECTING, State.CONNECTED]:
                    await trio.sleep(0.01)
            status, _, _ = await get(ingress, "/hello", token=_TOKEN)
            say(f"a visitor gets {status} again")
            assert status == 200
            nursery.cancel_scope.cancel()
    finally:
        relay.terminate()
        relay.wait(10)
    say(f"the gateway saw its visitors come from {', '.join(sorted(application.visitors))}, as the relay attests")
    say(f"statuses: {', '.join(seen)}; the relay ended with exit status {relay.returncode}")


def demonstrate() -> None:
    """Show it. What it makes is removed, also after Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        trio.run(demo, Path(folder))

"""A truncated stream never looks complete, also when the relay or the gateway is killed.

Both run as real processes. After SIGKILL of one of them, visitors and local connections end with a reset. A stream that
has ended in good order arrives complete, also at a slow reader, and ends with a FIN.
"""

from __future__ import annotations

import math
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import pytest
import trio
import trustme
from gateway import Gateway, connected
from programs import Program, key_file, running
from rig import HOST, KEY, free_port, read_all, read_exactly, request, until_it_raises, upload as endless_upload

from pioneer_tunnel.testing import open_pioneer_relay

CA: Final = trustme.CA()
MIB: Final = 1024 * 1024
PART: Final = 16 * 1024
"""As much as the buffers on the way take while it is not read."""
ANSWER: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"

ENDPOINTS: Final = ("ingress", "shared address", "bind_addr", "TLS at the relay", "TLS at the gateway")
TRANSPORTS: Final = ("tcp", "tls")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")]


@final
@attrs.frozen
class Exchange:
    """Both ends of a visit: what the visitor holds, and what the local server holds."""

    visitor: trio.abc.Stream
    local: trio.abc.HalfCloseableStream


@final
class Tunnel:
    """A way from visitors to a local server, through processes.

    Args:
        visit: connects as a visitor.
        local: the local server's listener.
        programs: the processes by name.
        closing: closes the streams that are opened here.
    """

    def __init__(
        self,
        visit: Callable[[], Awaitable[trio.abc.Stream]],
        local: trio.SocketListener,
        programs: dict[str, Program],
        closing: AsyncExitStack,
    ) -> None:
        self._visit: Final = visit
        self._local: Final = local
        self._programs: Final = programs
        self._closing: Final = closing

    async def exchange(self, asked: bytes) -> Exchange:
        visitor = await self._visit()
        self._closing.push_async_callback(trio.aclose_forcefully, visitor)
        await visitor.send_all(asked)
        local = await self._closing.enter_async_context(await self._local.accept())
        while not (heard := await local.receive_some(len(asked))):  # a probe of the local gateway
            local = await self._closing.enter_async_context(await self._local.accept())
        assert heard + await read_exactly(local, len(asked) - len(heard)) == asked
        return Exchange(visitor, local)

    def kill(self, name: str) -> None:
        process = self._programs[name].process
        process.kill()
        process.wait()


def issue(folder: Path, *hosts: str) -> tuple[Path, Path]:
    """A certificate and its private key."""
    issued = CA.issue_cert(*hosts)
    certificate, private_key = folder / "tls.crt", folder / "tls.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    private_key.write_bytes(issued.private_key_pem.bytes())
    return certificate, private_key


async def connect(port: int, *, tls: bool = False, strict: bool = False) -> trio.abc.Stream:
    """Connect as a visitor. To a `strict` one, the end of TLS without a close_notify is a break."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    if not tls:
        return stream
    trusting = ssl.create_default_context()
    CA.configure_trust(trusting)
    secured = trio.SSLStream(stream, trusting, server_hostname=HOST, https_compatible=not strict)
    await secured.do_handshake()
    return secured


@asynccontextmanager
async def native(folder: Path, endpoint: str, *, strict: bool = False) -> AsyncIterator[Tunnel]:
    """A relay and a gateway, each in a process of its own."""
    control, ingress, bound = free_port(), free_port(), free_port()
    if endpoint == "shared address":
        ingress = control
    certificate, private_key = issue(folder, HOST)
    files = f'control_tls = false\ntls_certificate = "{certificate}"\ntls_private_key = "{private_key}"'
    (folder / "relay.toml").write_text(
        f"""
        [relay]
        control_addr = "127.0.0.1:{control}"
        ingress_addr = "127.0.0.1:{ingress}"
        id = "relay-1"
        public_names = ["127.0.0.1:{control}"]
        {files if endpoint == "TLS at the relay" else ""}

        [[relay.tunnels]]
        id = "office"
        url = "https://{HOST}"
        key = "{KEY.identity().public_key}"
        {'tls = "passthrough"' if endpoint == "TLS at the gateway" else ""}
        {f'bind_addr = "127.0.0.1:{bound}"' if endpoint == "bind_addr" else ""}
        """
    )
    options: list[str | Path] = ["--relay", f"ws://127.0.0.1:{control}"]
    if endpoint == "TLS at the gateway":
        options += ["--tls-certificate", certificate, "--tls-private-key", private_key]
    with running("relay", "--config", folder / "relay.toml") as relay:
        await until_said(relay, "gateways at")
        async with exposed(folder, *options) as (gateway, local):
            visit = partial(
                connect, bound if endpoint == "bind_addr" else ingress, tls=endpoint.startswith("TLS"), strict=strict
            )
            async with AsyncExitStack() as closing:
                yield Tunnel(visit, local, {"relay": relay, "gateway": gateway}, closing)


@asynccontextmanager
async def bare(folder: Path, transport: str) -> AsyncIterator[Tunnel]:
    """A gateway in a process of its own, at a relay of transport tcp or tls in this one."""
    options: list[str | Path] = ["--transport", transport]
    context = None
    if transport == "tls":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        CA.issue_cert("localhost").configure_cert(context)
        CA.cert_pem.write_to_path(folder / "ca.crt")
        options += ["--ca-file", folder / "ca.crt"]
    async with open_pioneer_relay(key=KEY, tls=context) as relay:
        options += ["--relay", f"localhost:{relay.address.port}"]
        async with exposed(folder, *options) as (gateway, local), AsyncExitStack() as closing:
            yield Tunnel(relay.visit, local, {"gateway": gateway}, closing)


@asynccontextmanager
async def exposed(folder: Path, *options: str | Path) -> AsyncIterator[tuple[Program, trio.SocketListener]]:
    """A gateway in a process of its own, and the local server that it forwards to."""
    (local,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = f"127.0.0.1:{local.socket.getsockname()[1]}"
    key = key_file(folder, KEY.reveal())
    async with local:
        with running("expose", address, "--key-file", key, *options) as gateway:
            await until_said(gateway, r"\bconnected")
            yield gateway, local


async def until_said(program: Program, pattern: str) -> None:
    await trio.to_thread.run_sync(program.wait_for, pattern)


Start = Callable[[Path], AbstractAsyncContextManager[Tunnel]]

KILLED: Final = [
    *(
        pytest.param(partial(native, endpoint=endpoint), end, id=f"{endpoint}, {end}")
        for endpoint in ENDPOINTS
        for end in ("relay", "gateway")
    ),
    *(pytest.param(partial(bare, transport=name), "gateway", id=name) for name in TRANSPORTS),
]
ORDERLY: Final = [
    *(pytest.param(partial(native, endpoint=endpoint, strict=True), id=endpoint) for endpoint in ENDPOINTS),
    *(pytest.param(partial(bare, transport=name), id=name) for name in TRANSPORTS),
]


async def send_until_broken(stream: trio.abc.Stream) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await until_it_raises(partial(stream.send_all, bytes(64 * 1024)))


async def ending(stream: trio.abc.ReceiveStream) -> str:
    try:
        await read_all(stream)
    except trio.BrokenResourceError:
        return "reset"
    return "FIN"


async def read_slowly(stream: trio.abc.ReceiveStream, amount: float = math.inf) -> bytes:
    received = bytearray()
    while len(received) < amount and (data := await stream.receive_some(64 * 1024)):
        received += data
        await trio.sleep(0.005)
    return bytes(received)


@pytest.mark.parametrize(("start", "killed"), KILLED)
async def test_after_a_kill_every_stream_ends_with_a_reset(start: Start, killed: str, tmp_path: Path) -> None:
    async with start(tmp_path) as tunnel:
        # Two streams that are silent at the moment of the kill.
        download, upload = await tunnel.exchange(request()), await tunnel.exchange(endless_upload())
        await download.local.send_all(ANSWER + bytes(PART))
        await read_exactly(download.visitor, len(ANSWER) + PART)
        await upload.visitor.send_all(bytes(PART))
        await read_exactly(upload.local, PART)
        await upload.local.send_all(ANSWER)  # without it, the relay answers with a whole 502
        await read_exactly(upload.visitor, len(ANSWER))
        # And two with data in flight.
        downloading, uploading = await tunnel.exchange(request()), await tunnel.exchange(endless_upload())
        await downloading.local.send_all(ANSWER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_until_broken, downloading.local)
            nursery.start_soon(send_until_broken, uploading.visitor)
            await read_exactly(downloading.visitor, 4 * MIB)
            await read_exactly(uploading.local, 4 * MIB)

            tunnel.kill(killed)

            heard = {
                "visitor that downloads": await ending(download.visitor),
                "server that is downloaded from": await ending(download.local),
                "visitor that uploads": await ending(upload.visitor),
                "server that is uploaded to": await ending(upload.local),
                "visitor that downloads, in flight": await ending(downloading.visitor),
                "server that is uploaded to, in flight": await ending(uploading.local),
            }
        assert heard == dict.fromkeys(heard, "reset")


@pytest.mark.parametrize("start", ORDERLY)
async def test_what_has_ended_in_good_order_arrives_complete_at_a_slow_reader(start: Start, tmp_path: Path) -> None:
    answer, body = ANSWER + bytes(4 * MIB), bytes(4 * MIB)
    async with start(tmp_path) as tunnel, trio.open_nursery() as nursery:
        download = await tunnel.exchange(request())
        upload = await tunnel.exchange(request(f"Content-Length: {len(body)}"))

        async def answer_and_close() -> None:
            await download.local.send_all(answer)
            await download.local.aclose()

        async def upload_and_end() -> None:
            await upload.visitor.send_all(body)
            if isinstance(upload.visitor, trio.abc.HalfCloseableStream):
                await upload.visitor.send_eof()

        nursery.start_soon(answer_and_close)
        nursery.start_soon(upload_and_end)
        assert await read_slowly(download.visitor) == answer
        assert await read_slowly(upload.local, len(body)) == body
        if isinstance(upload.visitor, trio.abc.HalfCloseableStream):
            assert await read_all(upload.local) == b""
        await upload.local.aclose()
        assert await read_all(upload.visitor) == b""


async def test_to_see_whether_the_local_gateway_is_there_is_no_reset(tmp_path: Path) -> None:
    (local,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with local:
        config = {"local_addr": f"127.0.0.1:{local.socket.getsockname()[1]}"}
        async with connected(Gateway(tmp_path).remote_access(config, handler=None)), await local.accept() as probe:
            assert await read_all(probe) == b""

"""A relay in a process of its own never holds a byte of plaintext of a tunnel whose TLS it passes through.

What a visitor and a gateway say is looked for in all the memory of the relay's process and in all that it receives and
sends. And so that the search can fail: through a tunnel whose TLS the relay ends, the same search finds it.
"""

from __future__ import annotations

import os
import re
import secrets
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, final

import pytest
import trio
import trustme
from rig import AT_ONCE, HOST, KEY, RELAY_NAME, connect, in_background, no_hang, read_exactly, request

import pioneer_tunnel
from pioneer_tunnel import Address, Certificate, TunnelStream, open_tunnel, terminate_tls
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.transports.tunnel_stream import Handler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="another process's memory is read from /proc")

CHUNK: Final = 4 * 1024 * 1024
REPEATED: Final = 1000
CA: Final = trustme.CA()


# The search


def found_in_memory(process: int, canaries: list[bytes]) -> set[bytes]:
    """Which of `canaries` are anywhere in what the process has mapped and may read."""
    regions = []
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        start, end, rights = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()  # type: ignore[union-attr]
        if "r" in rights:
            regions.append((int(start, 16), int(end, 16)))
    found: set[bytes] = set()
    try:
        memory = os.open(f"/proc/{process}/mem", os.O_RDONLY)
    except PermissionError:
        pytest.skip("this system lets nobody read another process's memory")
    try:
        for start, end in regions:
            position, overlap = start, b""
            while position < end:
                try:
                    data = os.pread(memory, min(CHUNK, end - position), position)
                except OSError:
                    break  # the kernel's own pages
                if not data:
                    break
                found |= {canary for canary in canaries if canary in overlap + data}
                overlap = data[-100:]
                position += len(data)
    finally:
        os.close(memory)
    return found


@final
class Tap:
    """A TCP proxy that keeps all that passes it."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self.address: Address
        self.passed = {"there": bytearray(), "back": bytearray()}

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = Address("127.0.0.1", listener.socket.getsockname()[1])
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, near: trio.SocketStream) -> None:
        async with await connect(self._target) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, near, far, "there")
            nursery.start_soon(self._copy, far, near, "back")

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, way: str) -> None:
        try:
            async for data in source:
                self.passed[way] += data
                await sink.send_all(data)
            await sink.send_eof()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(sink)


# Who speaks


def issue(folder: Path, name: str, *hosts: str) -> None:
    issued = CA.issue_cert(*hosts)
    (folder / f"{name}.key").write_bytes(issued.private_key_pem.bytes())
    (folder / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))


@contextmanager
def relay_process(folder: Path, tls: str) -> Iterator[tuple[int, Address, Address]]:
    """A relay with one tunnel: its process id, and where gateways and visitors come in."""
    folder.mkdir()
    issue(folder, "relay", HOST)
    (folder / "relay.toml").write_text(
        f"""
        [relay]
        id = "blind"
        control_addr = "127.0.0.1:0"
        ingress_addr = "localhost:0"
        control_tls = false
        public_names = ["{RELAY_NAME}"]
        tls_certificate = "relay.crt"
        tls_private_key = "relay.key"

        [[relay.tunnels]]
        id = "office"
        url = "https://{HOST}"
        key = "{KEY.identity().public_key}"
        tls = "{tls}"
        """
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pioneer_tunnel.__file__).parent.parent)}
    command = [sys.executable, "-m", "pioneer_tunnel", "relay", "--config", str(folder / "relay.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while (addresses := re.search(r"gateways at (\S+), visitors at (\S+)\n", said)) is None:
                line = process.stderr.readline()
                assert line, f"the relay ended with {said!r}"
                said += line
            yield process.pid, Address.parse(addresses[1]), Address.parse(addresses[2])
        finally:
            process.kill()


@asynccontextmanager
async def tapped(address: Address) -> AsyncIterator[Tap]:
    tap = Tap(address)
    async with trio.open_nursery() as nursery:
        await nursery.start(tap.run)
        yield tap
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("tls", ["passthrough", "terminate"])
async def test_what_a_relay_can_read(tls: str, tmp_path: Path) -> None:
    asked, answered = (secrets.token_hex(20).encode() for _ in range(2))
    question = request(f"Authorization: Bearer {asked.decode()}", body=asked * REPEATED)

    async def answer(stream: TunnelStream) -> None:
        async with stream:
            assert await read_exactly(stream, len(question)) == question
            await stream.send_all(answered * REPEATED)
            await stream.receive_some()

    handler: Handler = answer
    if tls == "passthrough":
        issue(tmp_path, "gateway", HOST)
        handler = terminate_tls(answer, Certificate(tmp_path / "gateway.crt", tmp_path / "gateway.key"))
    trusting = ssl.create_default_context()
    CA.configure_trust(trusting)

    with relay_process(tmp_path / "relay", tls) as (process, control, ingress):
        async with tapped(control) as gateway_side, tapped(ingress) as visitor_side:

            async def dial(host: str, port: int) -> trio.SocketStream:
                return await connect(gateway_side.address)

            async with open_tunnel(f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE) as tunnel:
                with no_hang():
                    await tunnel.wait_connected()
                    async with in_background(lambda: trio.serve_listeners(handler, [tunnel])):
                        visitor = TlsStream(await connect(visitor_side.address), trusting, server_hostname=HOST)
                        await visitor.do_handshake()
                        await visitor.send_all(question)
                        assert await read_exactly(visitor, len(answered) * REPEATED) == answered * REPEATED
                        # Everything was said, and the connection is still there with all that hangs on it.
                        in_memory = found_in_memory(process, [asked, answered])
                        await visitor.aclose()
                in_memory |= found_in_memory(process, [asked, answered])

    in_traffic = {
        canary
        for canary in (asked, answered)
        for side in (gateway_side, visitor_side)
        for passed in side.passed.values()
        if canary in passed
    }
    for side in (gateway_side, visitor_side):
        assert all(len(passed) > len(asked) * REPEATED for passed in side.passed.values()), "it all went by here"
    if tls == "passthrough":
        assert (in_memory, in_traffic) == (set(), set())
    else:
        assert in_memory == {asked, answered}
        # In the other direction a WebSocket masks what the gateway says, which hides it from nobody but this search.
        assert in_traffic == {asked}

"""A gateway whose only way out is a proxy: no packet passes the proxy by, and no name is resolved at the gateway."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trustme
from fenced import GATEWAY, WORLD, Fence, Packet, fence, lines_of
from real_proxies import PASSWORD, PROXIES, USER, RealProxy, real_proxy
from rig import KEY

pytestmark = pytest.mark.slow
TCP, UDP = 6, 17
RELAY: Final = str(Path(__file__).parents[1] / "support" / "world.py")
SERVER: Final = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("serving at", server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def fenced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with fence(tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request: pytest.FixtureRequest, fenced: Fence) -> Iterator[RealProxy]:
    with real_proxy(request.param, authenticates=True, host=WORLD, within=fenced.world) as running:
        yield running


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(ca: trustme.CA, tmp_path: Path) -> list[str]:
    issued = ca.issue_cert("relay.test")
    files = [tmp_path / "relay.crt", tmp_path / "relay.key"]
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return [str(file) for file in files]


def secret(path: Path, text: str) -> str:
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return str(path)


def expose(local: int, relay: str, folder: Path, *options: str) -> list[str]:
    key = secret(folder / "key", KEY.reveal())
    command = [sys.executable, "-m", "pioneer_tunnel", "expose", f"127.0.0.1:{local}"]
    return [*command, "--relay", relay, "--key-file", key, *options]


@pytest.mark.parametrize("transport", ["websocket", "tcp", "tls"])
def test_the_proxy_is_the_only_way_out(
    transport: str, fenced: Fence, proxy: RealProxy, certificate: list[str], tmp_path: Path
) -> None:
    options = ["--proxy", proxy.url, "--transport", transport]
    options += ["--proxy-credentials-file", secret(tmp_path / "credentials", f"{USER}:{PASSWORD}")]
    kind = [transport]
    if transport == "tls":
        kind += certificate
        options += ["--ca-file", str(tmp_path / "ca.pem")]
    packets: list[Packet] = []
    with (
        fenced.program(fenced.gateway, sys.executable, "-c", SERVER) as server,
        fenced.program(fenced.world, sys.executable, RELAY, *kind) as relay,
        fenced.recorded(packets),
    ):
        local = int(lines_of(server, r"serving at (\d+)")[1])
        port = int(lines_of(relay, r"listening at (\d+)")[1])
        place = f"relay.test:{port}"
        address = f"ws://{place}" if transport == "websocket" else place
        with fenced.program(fenced.gateway, *expose(local, address, tmp_path, *options)) as gateway:
            lines_of(gateway, "^connected ")
            assert relay.stdin is not None
            for _ in range(3):
                relay.stdin.write("\n")
                relay.stdin.flush()
                assert lines_of(relay, "visited (.*)")[1].endswith("hello'")
    outside = [packet for packet in packets if (packet.source, packet.target) != ("127.0.0.1", "127.0.0.1")]
    assert outside, "the recorder sees the wire"
    there = (TCP, GATEWAY, WORLD, proxy.port)
    back = (TCP, WORLD, GATEWAY, proxy.port)
    for packet in outside:
        seen = {
            (packet.protocol, packet.source, packet.target, packet.target_port),
            (packet.protocol, packet.source, packet.target, packet.source_port),
        }
        assert seen & {there, back}, f"{packet} passes the proxy by"
    assert {packet.protocol for packet in packets} == {TCP}


def test_without_a_proxy_the_name_is_asked_for_and_that_is_seen(fenced: Fence, tmp_path: Path) -> None:
    """The test above can fail."""
    packets: list[Packet] = []
    with fenced.recorded(packets):
        command = expose(9, "ws://relay.test:80", tmp_path, "--proxy", "none")
        with fenced.program(fenced.gateway, *command) as gateway:
            lines_of(gateway, "^failed .*does not resolve")
    assert any(packet.protocol == UDP and packet.target_port == 53 for packet in packets)

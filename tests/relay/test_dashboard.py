"""The operator's page of a relay, over real connections: what it tells, whom it tells, and how it is configured."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from relay_problems import only_problem_of, relay
from rig import (
    HOST,
    KEY,
    RelayRig,
    eventually,
    free_port,
    no_hang,
    read_all,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel import Address, StreamStats, UnixAddress, new_relay_key
from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.stats import SessionStats
from pioneer_tunnel.monitoring import site as http_site
from pioneer_tunnel.relay import ConnectionStats, Relay, RelayConfig, RelayStats, RelayTunnelStats
from pioneer_tunnel.relay.dashboard import site
from pioneer_tunnel.relay.dashboard.history import SAMPLES, History, Traffic
from pioneer_tunnel.relay.dashboard.report import TUNNELS_SHOWN, report
from pioneer_tunnel.relay.inherited import Inherited
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

PATHS: Final = ("/", "/dashboard.css", "/dashboard.js", "/icon.svg", "/report.json")


def a_key() -> str:
    """A key that nobody has."""
    return str(new_relay_key().identity().public_key)


@asynccontextmanager
async def dashboard(address: str = "127.0.0.1:0", **changes: Any) -> AsyncIterator[RelayRig]:
    async with relay_rig(dashboard=address, **changes) as rig:
        yield rig


async def connect(rig: RelayRig) -> trio.SocketStream:
    address = rig.addresses.dashboard
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    assert address is not None
    return await trio.open_tcp_stream(address.host, address.port)


async def ask(rig: RelayRig, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to what is `sent`."""
    with no_hang():
        async with await connect(rig) as stream:
            await stream.send_all(sent)
            head, _, body = (await read_all(stream)).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert len(headers) == len(lines)
    return int(status.split()[1]), headers, body


async def get(rig: RelayRig, path: str, host: str = "localhost:9090") -> tuple[int, dict[str, str], bytes]:
    return await ask(rig, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


async def reported(rig: RelayRig) -> dict[str, Any]:
    status, _, body = await get(rig, "/report.json")
    assert status == 200
    found: dict[str, Any] = json.loads(body)
    return found


async def answer(stream: TunnelStream) -> None:
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


async def test_it_tells_of_tunnels_sessions_and_refusals() -> None:
    away = tunnel_entry(id="away", url="http://away.test", key=a_key())
    async with dashboard(tunnels=[tunnel_entry(), away]) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(accept_visitors, tunnel, answer, nursery)
        with no_hang():
            await tunnel.wait_connected()
            for host in (HOST, "unknown.test", "away.test"):
                async with await rig.visit() as visitor:
                    await visitor.send_all(request("Connection: close", host=host))
                    await read_all(visitor)
        told = await reported(rig)
        assert told["id"] == "relay-of-the-tests"
        assert (told["tunnels_connected"], told["tunnels_total"]) == (1, 2)
        office, other = told["tunnels"]
        assert (office["id"], office["addresses"]) == ("office", [f"http://{HOST}"])
        (session,) = office["sessions"]
        assert session["agent"].startswith("pioneer-tunnel/")
        assert session["peer"].startswith("127.0.0.1:")
        assert office["streams"]["opened_total"] == 1
        assert office["streams"]["to_visitors_bytes_total"] > 40
        assert (other["id"], other["sessions"], other["refusals"]) == ("away", [], 1)
        assert {entry["reason"]: entry["total"] for entry in told["refusals"]} == {"unknown_host": 1, "gateway_away": 1}
        nursery.cancel_scope.cancel()


async def test_it_tells_no_key() -> None:
    async with dashboard() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        text = json.dumps(await reported(rig))
        assert KEY.reveal() not in text
        assert str(KEY.identity().public_key) not in text
        assert "instance" not in text


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_forbids_what_the_page_does_not_need(path: str) -> None:
    async with dashboard() as rig:
        status, headers, body = await get(rig, path)
        assert status == 200
        assert len(body) == int(headers["content-length"])
        policy = headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} <= {*policy}
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control-")]
        assert b"https://" not in body
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"").replace(
            f"http://{HOST}".encode(), b""
        )
        assert not [way for way in (b"innerHTML", b"outerHTML", b"insertAdjacentHTML", b" style=") if way in body]


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:9090", "localhost.evil.test", "0.0.0.0", "192.0.2.1", "127.1", ""]
)
async def test_a_name_that_was_bound_to_loopback_is_refused(path: str, host: str) -> None:
    async with dashboard() as rig:
        status, _, body = await get(rig, path, host)
        assert (status, body) == (421, b"this page is at localhost\n")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9090", "127.0.0.2", "[::1]:9090"])
async def test_it_is_at_any_loopback_name(host: str) -> None:
    """With any port: `ssh -L` gives it another one."""
    async with dashboard() as rig:
        assert (await get(rig, "/", host))[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        ("POST /report.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
        ("GET /../config.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("GET /dashboard.html HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("GET http://evil.test/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\n\r\n", 421),
        ("\0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 17_000, 431),
    ],
)  # fmt: skip
async def test_what_it_does_not_answer(sent: str, status: int) -> None:
    async with dashboard() as rig:
        assert (await ask(rig, sent.encode()))[0] == status
        assert (await get(rig, "/"))[0] == 200


async def test_silent_connections_do_not_keep_it_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_site, "CONNECTIONS", 3)
    monkeypatch.setattr(http_site, "REQUEST_TIMEOUT", 0.5)
    async with dashboard() as rig:
        silent = [await connect(rig) for _ in range(4)]
        with no_hang(), suppress(trio.BrokenResourceError):
            assert await silent[3].receive_some() == b""  # one too many
        with no_hang():
            assert [await stream.receive_some() for stream in silent[:3]] == [b"", b"", b""]
        assert (await get(rig, "/"))[0] == 200
        for stream in silent:
            await stream.aclose()


# Where it listens


async def test_a_relay_without_one_listens_nowhere_else() -> None:
    async with relay_rig() as rig:
        assert rig.addresses.dashboard is None


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")
async def test_at_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "dashboard.sock"
    left = socket.socket(socket.AF_UNIX)  # by a process that was killed
    left.bind(str(path))
    left.close()
    async with dashboard(f"unix:{path}") as rig:
        assert path.stat().st_mode & 0o777 == 0o600
        assert (await get(rig, "/"))[0] == 200
        with no_hang(), pytest.raises(OSError, match=r"cannot listen at unix:.*in use"):
            await Relay(relay_config(dashboard=f"unix:{path}")).serve()
        assert (await get(rig, "/"))[0] == 200
    assert [*tmp_path.iterdir()] == []
    path.write_text("somebody's file")
    with no_hang(), pytest.raises(OSError, match="a file of another kind"):
        await Relay(relay_config(dashboard=f"unix:{path}")).serve()
    assert path.read_text() == "somebody's file"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")
async def test_a_process_that_hangs_at_its_socket_does_not_hang_the_relay(tmp_path: Path) -> None:
    path = str(tmp_path / "dashboard.sock")
    with ExitStack() as stack:
        hanging = stack.enter_context(socket.socket(socket.AF_UNIX))
        hanging.bind(path)
        hanging.listen(0)
        for _ in range(2):  # its backlog is full
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(path)
        with no_hang(), pytest.raises(OSError, match=r"cannot listen at unix:.*in use"):
            await Relay(relay_config(dashboard=f"unix:{path}")).serve()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")
async def test_a_socket_that_cannot_be_made_is_told_with_the_reason(tmp_path: Path) -> None:
    path = str(tmp_path / "s").ljust(107, "s")
    with no_hang(), pytest.raises(OSError, match=r"cannot listen at unix:.*too long"):
        await Relay(relay_config(dashboard=f"unix:{path}")).serve()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")
@pytest.mark.parametrize("kind", ["port", "unix"])
async def test_a_successor_goes_on_with_its_socket(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "dashboard.sock"
    address = f"127.0.0.1:{free_port()}" if kind == "port" else f"unix:{path}"
    async with trio.open_nursery() as nursery:
        async with dashboard(address) as rig:
            # As a successor gets them; this one takes the socket of the page alone, and has other ports for the rest.
            name = address.removeprefix("unix:")
            passed = [socket.socket(fileno=os.dup(fd)) for fd in rig.relay.handover().descriptors[name]]
            successor = Relay(rig.config, inherited=Inherited({name: passed}))
            await nursery.start(successor.serve)
        assert path.exists() == (kind == "unix")
        assert (await get(rig, "/"))[0] == 200
        nursery.cancel_scope.cancel()
    assert not path.exists()


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:9090", "[::]:9090", "192.0.2.1:9090", "relay.example.com:9090", "9090", "unix:relative", "", 9090],
)
def test_other_hosts_never_reach_it(address: object) -> None:
    problem = only_problem_of(relay(dashboard=address))
    assert problem.key == "relay.dashboard"


def test_it_has_an_address_of_its_own() -> None:
    with pytest.raises(InvalidSettingsError, match=r"relay.dashboard.*control_addr too"):
        RelayConfig.from_table(relay(control_addr="127.0.0.1:9090", dashboard="127.0.0.1:9090"))
    for address in ("localhost:9090", "[::1]:9090", "127.0.0.2:0"):
        assert RelayConfig.from_table(relay(dashboard=address)).dashboard == Address.parse(address, listening=True)


# What is remembered


CONNECTIONS: Final = ConnectionStats(
    open=0, limit=1, visitors_open=0, visitors_limit=1, pending=0, pending_limit=1, accepted_total=0, evicted_total=0
)


def stats(tunnels: Mapping[str, RelayTunnelStats] | None = None, **refusals: int) -> RelayStats:
    tunnels = tunnels or {}
    return RelayStats(
        since_unix=0,
        draining=False,
        connections=CONNECTIONS,
        tunnels=tunnels,
        streams=sum((tunnel.streams for tunnel in tunnels.values()), StreamStats()),
        refusals_total=refusals,
    )


def counted(sent: int) -> RelayTunnelStats:
    return RelayTunnelStats(streams=StreamStats(from_visitors_bytes_total=sent, to_visitors_bytes_total=2 * sent))


def test_the_history_has_what_was_added_and_an_end() -> None:
    history = History()
    history.add(stats({"office": counted(100), "idle": counted(7)}))
    assert history.traffic() == []
    history.add(stats({"office": counted(150), "idle": counted(7), "added": counted(3)}))
    history.add(stats({"office": counted(10), "idle": counted(7)}))  # removed, and added again: it counts from 0
    assert history.traffic() == [Traffic(53, 106), Traffic(0, 0)]
    assert history.traffic_of("office") == [Traffic(50, 100), Traffic(0, 0)]
    assert history.traffic_of("unknown") == [Traffic(0, 0)] * 2
    assert history.busy() == {"office": 150, "added": 9}
    for _ in range(SAMPLES):
        history.add(stats())
    assert history.traffic() == [Traffic(0, 0)] * SAMPLES
    assert not history.busy()


def test_the_history_has_refusals_by_reason() -> None:
    history = History()
    looks: list[dict[str, Any]] = [{}, {"busy": 2}, {"busy": 2, "unknown_host": 1}, {"busy": 5, "unknown_host": 1}]
    for refusals in looks:
        history.add(stats(**refusals))
    assert history.refusals() == {"busy": [2, 0, 3], "unknown_host": [0, 1, 0]}


def test_a_report_has_the_busiest_tunnels_first_and_is_bounded() -> None:
    names = [f"tunnel-{number}" for number in range(TUNNELS_SHOWN + 50)]
    config = relay_config(tunnels=[tunnel_entry(id=name, url=f"http://{name}.test", key=a_key()) for name in names])
    session = SessionStats(id="session", peer="192.0.2.1:1")
    history, before = History(), {name: counted(0) for name in names}
    history.add(stats(before))
    now = before | {names[-1]: counted(5), names[-2]: counted(50), names[-3]: RelayTunnelStats(sessions=(session,))}
    history.add(stats(now))
    told = report(config, stats(now), history, 0.0)
    assert [tunnel["id"] for tunnel in told["tunnels"][:3]] == [names[-2], names[-1], names[-3]]
    assert len(told["tunnels"]) == TUNNELS_SHOWN
    assert told["tunnels_total"] == len(names)
    assert told["tunnels_connected"] == 1
    json.dumps(told)


async def test_samples_are_taken_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "INTERVAL", 0.01)
    async with dashboard() as rig:

        async def has_samples() -> bool:
            return len((await reported(rig))["traffic"]["to_visitors"]) >= 3

        await eventually(has_samples)

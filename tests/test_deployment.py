"""The files in examples/deploy: each is read by the program that it is for, and a visitor and a gateway get through."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
from deploying import (
    DEPLOY,
    HOST,
    RELAY_NAME,
    VISITOR,
    a_request,
    changed,
    connected,
    needs,
    nginx_around,
    visiting,
    write_certificate,
)
from documents import DOCS
from example_programs import running_program
from rig import KEY, eventually, free_port, no_hang, read_all, read_until, tunnel_entry
from trio_websocket import wrap_client_stream, wrap_server_stream

from pioneer_tunnel import PrefixedStream, State, Status, TunnelStats, open_tunnel
from pioneer_tunnel._model.certificate_status import CertificateStatus
from pioneer_tunnel._model.stats import StreamStats
from pioneer_tunnel.cli.commands import pioneer_tunnel as command_line
from pioneer_tunnel.monitoring import collect_metrics, serve_metrics
from pioneer_tunnel.relay import ConnectionStats, Relay, RelayAddresses, RelayConfig, RelayStats, RelayTunnelStats
from pioneer_tunnel.relay.administration.unit import unit_text
from pioneer_tunnel.relay.metrics import relay_families
from pioneer_tunnel.relay.stats import FleetStats, WorkerStats
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

# A proxy in front of a relay


@attrs.frozen
class Front:
    """A proxy in front of a relay: how it is started, and what is changed in its file."""

    file: str
    relay: str
    command: Callable[[Path], tuple[str | Path, ...]]
    changes: Callable[[Path, int, int], dict[str, str]]
    before: Callable[[Path, int], str] = lambda _folder, _port: ""
    after: str = ""
    checks: bool = True

    def write(self, folder: Path, port: int, relay_port: int) -> tuple[str | Path, ...]:
        text = changed(self.file, **self.changes(folder, port, relay_port))
        (folder / self.file).write_text(self.before(folder, port) + text + self.after)
        return self.command(folder)


def _caddy_around(folder: Path, port: int) -> str:
    return f"{{\nadmin off\nhttp_port {free_port()}\nhttps_port {port}\nstorage file_system {folder}/caddy\n}}\n"


def _haproxy_changes(folder: Path, port: int, relay_port: int) -> dict[str, str]:
    listening = {"bind :443": f"bind 127.0.0.1:{port}", "127.0.0.1:8443": f"127.0.0.1:{relay_port}"}
    return {**listening, "maxconn 16384": "maxconn 1000"}  # for which there are descriptors everywhere


FRONTS: Final = {
    "nginx": Front(
        "nginx.conf",
        "relay.toml",
        lambda folder: ("nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"),
        lambda folder, port, relay_port: {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "127.0.0.1:8443": f"127.0.0.1:{relay_port}",
            "/etc/ssl/": f"{folder}/",
        },
        nginx_around,
        "}\n",
        checks=False,
    ),
    "haproxy": Front(
        "haproxy.cfg",
        "relay.toml",
        lambda folder: ("haproxy", "-db", "-f", folder / "haproxy.cfg"),
        lambda *where: {**_haproxy_changes(*where), "/etc/haproxy/": f"{where[0]}/"},
    ),
    "haproxy-tcp": Front(
        "haproxy-tcp.cfg",
        "relay-tcp.toml",
        lambda folder: ("haproxy", "-db", "-f", folder / "haproxy-tcp.cfg"),
        _haproxy_changes,
    ),
    "caddy": Front(
        "Caddyfile",
        "relay.toml",
        lambda folder: ("caddy", "run", "--adapter", "caddyfile", "--config", folder / "Caddyfile"),
        lambda folder, port, relay_port: {
            "/etc/caddy/": f"{folder}/",
            "127.0.0.1:8443": f"127.0.0.1:{relay_port}",
        },
        _caddy_around,
    ),
}


def relay_config(name: str, folder: Path, port: int) -> RelayConfig:
    """The relay of an example, with a free port and the key of the tests."""
    key = re.search(r'"(ed25519:.*?)"', (DEPLOY / name).read_text())
    assert key is not None
    changes = {"127.0.0.1:8443": f"127.0.0.1:{port}", key[1]: str(KEY.identity().public_key)}
    (folder / name).write_text(changed(name, **changes, **{"127.0.0.1:9100": "127.0.0.1:0"}))
    return RelayConfig.load(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name.partition("-")[0])) for name in FRONTS])
async def test_visitors_and_gateways_get_through(name: str, tmp_path: Path) -> None:
    front = FRONTS[name]
    front_port, relay_port = free_port(), free_port()
    write_certificate(tmp_path)
    came: list[TunnelStream] = []
    heads: list[bytes] = []

    async def serve(stream: TunnelStream) -> None:
        """Answer requests; speak WebSocket if that is asked for."""
        came.append(stream)
        with suppress(trio.BrokenResourceError):  # at the end, for a connection that HAProxy has kept
            async with stream:
                head = await read_until(stream, b"\r\n\r\n")
                heads.append(head)
                if b"upgrade: websocket" in head.lower():
                    await _echo_websocket(stream, head)
                    return
                while head:
                    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
                    head = bytes(await stream.receive_some())

    async def dial(host: str, port: int) -> trio.SocketStream:
        assert host == RELAY_NAME
        return await trio.open_tcp_stream("127.0.0.1", front_port)

    relay = Relay(relay_config(front.relay, tmp_path, relay_port))
    async with trio.open_nursery() as nursery:
        with no_hang():
            await nursery.start(relay.serve)
            command = front.write(tmp_path, front_port, relay_port)
            async with (
                running_program(*command) as program,
                open_tunnel(f"wss://{RELAY_NAME}", key=KEY, ca_file=tmp_path / "ca.pem", dial=dial) as tunnel,
            ):
                nursery.start_soon(accept_visitors, tunnel, serve, nursery)
                try:
                    await connected(tunnel)
                    await _visit_it(front_port, came)
                    ids = {line for head in heads for line in head.lower().splitlines() if b"x-request-id" in line}
                    assert len(ids) == (2 if front.relay == "relay.toml" else 0), ids
                    if front.checks:
                        accepted = relay.stats().connections.accepted_total
                        await eventually(lambda: relay.stats().connections.accepted_total > accepted)  # health checks
                    assert not {*relay.stats().refusals_total} - {"gateway_away"}, relay.stats().refusals_total
                except BaseException:
                    print(program.said)
                    raise
        nursery.cancel_scope.cancel()


async def _visit_it(port: int, came: list[TunnelStream]) -> None:
    forged = "X-Forwarded-For: 198.51.100.66"
    async with visiting(port) as visitor:
        for _ in range(2):
            await visitor.send_all(a_request(forged))
            assert (await read_until(visitor, b"hello")).startswith(b"HTTP/1.1 200 ")
    assert came[-1].visitor is not None
    assert came[-1].visitor.host == VISITOR
    assert came[-1].tls is True
    async with visiting(port) as visitor, trio.open_nursery() as nursery:
        websocket = await wrap_client_stream(nursery, visitor, HOST, "/")
        await websocket.send_message("is anybody there?")
        assert await websocket.get_message() == "is anybody there?"
        await websocket.aclose()


async def _echo_websocket(stream: TunnelStream, head: bytes) -> None:
    async with trio.open_nursery() as nursery:
        request = await wrap_server_stream(nursery, PrefixedStream(stream, head))
        async with await request.accept() as websocket:
            await websocket.send_message(await websocket.get_message())
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@needs("haproxy")
async def test_a_balancer_moves_away_from_a_relay_that_stops(tmp_path: Path) -> None:
    """Two relays behind HAProxy. The server behind the one that stops is down before its visitors have gone."""
    port, ports = free_port(), (free_port(), free_port())
    changes = _haproxy_changes(tmp_path, port, ports[0])
    write_certificate(tmp_path)
    text = changed(
        "haproxy.cfg", **changes, **{"/etc/haproxy/": f"{tmp_path}/", "inter 2s fall 2": "inter 100ms fall 1"}
    )
    second = text.splitlines()[-1].replace("relay-1", "relay-2").replace(str(ports[0]), str(ports[1]))
    (tmp_path / "haproxy.cfg").write_text(f"{text}{second}\n")
    async with trio.open_nursery() as nursery:
        relays = [Relay(relay_config("relay.toml", tmp_path, each)) for each in ports]
        with no_hang():
            for relay in relays:
                await nursery.start(relay.serve)
            async with running_program("haproxy", "-db", "-f", tmp_path / "haproxy.cfg") as program:
                for relay in relays:
                    seen = relay.stats().connections.accepted_total
                    await eventually(functools.partial(_has_accepted, relay, seen + 2))
                nursery.start_soon(relays[0].drain)
                await eventually(lambda: "Server relay/relay-1 is DOWN" in program.said)
                async with visiting(port) as visitor:
                    await visitor.send_all(a_request("Connection: close"))
                    assert b"the gateway is not connected" in await read_all(visitor)
        nursery.cancel_scope.cancel()


def _has_accepted(relay: Relay, more_than: int) -> bool:
    return relay.stats().connections.accepted_total > more_than


# Metrics


def metric_names() -> set[str]:
    """The names of all samples that a relay and a gateway can have."""
    one = dict.fromkeys((field.name for field in attrs.fields(ConnectionStats)), 0)
    certificates = {"a.test": CertificateStatus(not_after_unix=1, renew_at_unix=1)}
    tunnel = RelayTunnelStats(services={"": StreamStats()}, refusals_total={"busy": 1})
    worker = WorkerStats(
        index=0,
        pid=1,
        version="1",
        since_unix=0,
        draining=False,
        connections=ConnectionStats(**one),
        streams=StreamStats(),
        sessions_open=0,
        cpu_seconds_total=0,
        memory_bytes=1,
    )
    relay = RelayStats(
        since_unix=0,
        draining=False,
        connections=ConnectionStats(**one),
        tunnels={"t": tunnel},
        refusals_total={"x": 1},
        workers=(worker,),
        fleet=FleetStats(node="n", redis_reachable=True, nodes={"o": 0.1}, unconfirmed_seconds=0.0),
    )
    status = Status(state=State.CONNECTED, updated_at_unix=0, certificates=certificates)
    gateway = TunnelStats(since_unix=0, services={"": StreamStats()}, failures_total={"io": 1}, refusals_total={"x": 1})

    @attrs.frozen
    class Source:
        status: Status

        def stats(self) -> TunnelStats:
            return gateway

    families = [*relay_families(relay, certificates), *collect_metrics(Source(status))]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def named_in(expression: str) -> Iterator[str]:
    """The metrics in an expression, those behind a pattern of both sides included."""
    for name in re.findall(r"pioneer_tunnel_(?:\(relay\|gateway\)_)?\w+", expression):
        yield from (name.replace("(relay|gateway)", side) for side in ("relay", "gateway"))


def test_alerts_and_the_dashboard_name_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    expressions += [line for line in (DEPLOY / "alerts.yml").read_text().splitlines() if "summary" not in line]
    used = {name for expression in expressions for name in named_in(expression)}
    assert len(used) > 25
    assert used <= metric_names()
    placed = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in dashboard["panels"]]
    assert placed == sorted({*placed})


@needs("promtool")
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("check", "config", "prometheus-container.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
)
def test_prometheus_reads_its_files(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs("prometheus")
async def test_prometheus_scrapes_a_relay_and_a_gateway(tmp_path: Path) -> None:
    config = attrs.evolve(relay_config("relay.toml", tmp_path, free_port()), tunnels=[tunnel_entry()])
    relay, port = Relay(config), free_port()
    async with trio.open_nursery() as nursery:
        addresses: RelayAddresses = await nursery.start(relay.serve)

        async def dial(host: str, port: int) -> trio.SocketStream:
            return await trio.open_tcp_stream("127.0.0.1", addresses.control.port)

        async with open_tunnel(f"ws://{RELAY_NAME}", key=KEY, dial=dial) as tunnel:
            gateway = await nursery.start(serve_metrics, tunnel, "127.0.0.1:0")
            changes = {"127.0.0.1:9100": str(addresses.metrics), "127.0.0.1:9101": str(gateway), ": 15s": ": 1s"}
            (tmp_path / "prometheus.yml").write_text(changed("prometheus.yml", **changes))
            shutil.copy(DEPLOY / "alerts.yml", tmp_path)
            options = (f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path}/data")
            command = ("prometheus", f"--config.file={tmp_path}/prometheus.yml", *options)
            async with running_program(*command) as program:

                async def told(expression: str) -> dict[str, str]:
                    """The values of an expression by job."""
                    assert program.process.returncode is None, program.said
                    query = f"GET /api/v1/query?query={expression} HTTP/1.0\r\n\r\n".encode()
                    try:
                        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                            await stream.send_all(query)
                            body = (await read_all(stream)).partition(b"\r\n\r\n")[2]
                    except OSError:
                        return {}  # it does not listen yet
                    results = json.loads(body)["data"]["result"] if body.startswith(b"{") else []
                    return {result["metric"]["job"]: result["value"][1] for result in results}

                async def scraped() -> bool:
                    return await told("up") == {"pioneer-relay": "1", "pioneer-gateway": "1"}

                async def connected() -> bool:
                    at_relay = await told("pioneer_tunnel_relay_tunnel_connected")
                    ready = "pioneer_tunnel_gateway_state%7Bpioneer_tunnel_gateway_state=%22connected%22%7D"
                    return at_relay == {"pioneer-relay": "1"} and await told(ready) == {"pioneer-gateway": "1"}

                await eventually(scraped)
                await eventually(connected)
                assert "level=warn" not in program.said.lower()
        nursery.cancel_scope.cancel()


# Programs that start at boot, and containers


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda unit: unit.stem)
def test_units_start_a_command_that_is_understood(unit: Path) -> None:
    (command,) = re.findall(r"^ExecStart=(.+)$", unit.read_text(), re.MULTILINE)
    program, name, *arguments = command.split()
    assert program == "/opt/pioneer/bin/pioneer-tunnel"
    here = [str(DEPLOY / "relay.toml") if word.startswith("/etc/") else word for word in arguments]
    context = command_line.commands[name].make_context(name, here)
    assert context.params["config" if name == "relay" else "key_file"] == DEPLOY / "relay.toml"


def test_the_relays_unit_is_the_one_that_relay_init_writes() -> None:
    command = ["/opt/pioneer/bin/pioneer-tunnel", "relay", "--config", "/etc/pioneer-tunnel/relay.toml"]
    assert (DEPLOY / "pioneer-relay.service").read_text() == unit_text(command=command, user="pioneer-relay", port=443)


def test_the_guide_explains_every_alert() -> None:
    alerts = {*re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yml").read_text())}
    assert alerts == {*re.findall(r"`(Pioneer\w+)`", (DOCS / "monitoring.md").read_text())}


@pytest.mark.slow
@needs("systemd-analyze")
@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda unit: unit.stem)
def test_units_are_right_and_have_few_rights(unit: Path, tmp_path: Path) -> None:
    tried = tmp_path / unit.name
    tried.write_text(changed(unit.name, **{"/opt/pioneer/bin/pioneer-tunnel": "/bin/true"}))
    verified = subprocess.run(["systemd-analyze", "verify", tried], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(tried)]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout


def test_the_relays_of_the_examples_can_be_used(tmp_path: Path) -> None:
    files = sorted(DEPLOY.glob("relay*.toml"))
    assert len(files) == 3
    for file in files:
        config = RelayConfig.load(file)
        assert config.metrics is not None


def test_the_container_runs_the_relay() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    assert json.loads(entry) == ["pioneer-tunnel"]
    assert json.loads(command) == ["relay", "--config", "/etc/pioneer-tunnel/relay.toml"]
    (check,) = re.findall(r"HEALTHCHECK .* CMD (\[.+\])$", text, re.MULTILINE)
    compile(json.loads(check)[2], "HEALTHCHECK", "exec")
    extras = re.findall(r"/source\[(.+?)\]", text)[0].split(",")
    project = tomllib.loads((DEPLOY.parents[1] / "pyproject.toml").read_text())["project"]
    assert {*extras} <= project["optional-dependencies"].keys()


def test_compose_mounts_files_that_are_there() -> None:
    compose = (DEPLOY / "compose.yaml").read_text()
    (context,) = re.findall(r"context: (.+)", compose)
    (containerfile,) = re.findall(r"dockerfile: (.+)", compose)
    assert (DEPLOY / context / containerfile).resolve() == DEPLOY / "Containerfile"
    mounted = {*re.findall(r"- (\./.+?):", compose)}
    own = {"./relay.crt", "./relay.key"}  # the operator's
    assert own < mounted
    assert all((DEPLOY / file).is_file() for file in mounted - own)
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", compose)
    assert int(grace) > RelayConfig.load(DEPLOY / "relay-container.toml").drain_timeout_ms / 1000

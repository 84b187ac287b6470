"""The files in examples/deploy/fleet: three nodes behind a proxy, as real processes with a real Redis."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs
import pytest
import trio
from deploying import (
    DEPLOY,
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
from example_programs import Program, running, running_program
from redis_server import RealRedis, real_redis
from rig import KEY, eventually, free_port, no_hang, read_until

from pioneer_tunnel import Tunnel, TunnelStream, open_tunnel
from pioneer_tunnel.cli.commands import pioneer_tunnel as command_line
from pioneer_tunnel.relay import RelayConfig, RelayStats
from pioneer_tunnel.relay.administration.fleet_file import write_node_key
from pioneer_tunnel.relay.administration.running import ask_running

FLEET: Final = DEPLOY / "fleet"
NODES: Final = ("fra1", "fra2", "ams1")
VISITS: Final = 12


@final
@attrs.frozen
class Node:
    """A node that runs."""

    name: str
    file: Path
    program: Program

    async def stats(self) -> RelayStats | None:
        running = await ask_running(self.file)
        return None if running is None else running.stats


@pytest.fixture
def redis() -> Iterator[RealRedis]:
    with real_redis() as server:
        yield server


def write_nodes(folder: Path, redis: str) -> dict[str, tuple[Path, int]]:
    """The nodes of the example on loopback. Returns the file of each, and its port."""
    ports = {name: (free_port(), free_port()) for name in NODES}
    between = {f"{name}:7300": f"127.0.0.1:{ports[name][1]}" for name in NODES}
    (own_key,) = re.findall(r'^key = "(ed25519:.*?)"', (FLEET / "fra1.toml").read_text(), re.MULTILINE)
    written = {}
    for name in NODES:
        write_node_key(name, folder)
        changes = {
            **between,
            "0.0.0.0:8443": f"127.0.0.1:{ports[name][0]}",
            "0.0.0.0:9100": "127.0.0.1:0",
            "0.0.0.0:7300": f"127.0.0.1:{ports[name][1]}",
            "172.30.0.0/24": "127.0.0.1",
            "/var/lib/pioneer-tunnel/": f"{folder}/",
            "redis://redis:6379/0": redis,
            'redis_password_file = "redis.password"': "",
            own_key: str(KEY.identity().public_key),
        }
        file = folder / f"{name}.toml"
        file.write_text(changed(f"fleet/{name}.toml", **changes))
        written[name] = file, ports[name][0]
    return written


def write_haproxy(folder: Path, port: int, nodes: dict[str, str]) -> tuple[str | Path, ...]:
    changes = {**nodes, "bind :443": f"bind 127.0.0.1:{port}", "/etc/haproxy/": f"{folder}/", "maxconn 16384": ""}
    (folder / "haproxy.cfg").write_text(changed("fleet/haproxy.cfg", **changes, **{"inter 2s fall 2": "inter 100ms"}))
    return "haproxy", "-db", "-f", folder / "haproxy.cfg"


def write_nginx(folder: Path, port: int, nodes: dict[str, str]) -> tuple[str | Path, ...]:
    changes = {**nodes, "listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "/etc/ssl/": f"{folder}/"}
    text = nginx_around(folder, port) + changed("fleet/nginx.conf", **changes) + "}\n"
    (folder / "nginx.conf").write_text(text)
    return "nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"


@asynccontextmanager
async def nodes_behind(
    write: Callable[[Path, int, dict[str, str]], tuple[str | Path, ...]], folder: Path, redis: RealRedis
) -> AsyncIterator[tuple[list[Node], int]]:
    """The nodes, and the port of the proxy in front of them."""
    port = free_port()
    write_certificate(folder)
    files = write_nodes(folder, redis.url)
    async with AsyncExitStack() as stack:
        nodes = []
        for name, (file, _) in files.items():
            command = ("-m", "pioneer_tunnel", "relay", "--config", file)
            nodes.append(Node(name, file, await stack.enter_async_context(running(*command, cwd=folder))))
        for node in nodes:
            await node.program.says("gateways at")
        servers = {f"{name}:8443": f"127.0.0.1:{server}" for name, (_, server) in files.items()}
        front = await stack.enter_async_context(running_program(*write(folder, port, servers)))
        try:
            yield nodes, port
        except BaseException:
            print(front.said, *(node.program.said for node in nodes), sep="\n")
            raise


async def greet(tunnel: Tunnel) -> None:
    """Answer each visitor with its address."""

    async def serve(stream: TunnelStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await read_until(stream, b"\r\n\r\n")
                said = f"hello {stream.visitor}"
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n"
                await stream.send_all((head + said).encode())

    await trio.serve_listeners(serve, [tunnel])


async def visit(port: int) -> bytes:
    async with visiting(port) as visitor:
        await visitor.send_all(a_request("Connection: close"))
        return await read_until(visitor, b"\r\n\r\n") + (await visitor.receive_some() or b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_haproxy, id="haproxy", marks=needs("haproxy")),
        pytest.param(write_nginx, id="nginx", marks=needs("nginx")),
    ],
)
async def test_visitors_reach_the_gateway_through_any_node(
    write: Callable[[Path, int, dict[str, str]], tuple[str | Path, ...]], tmp_path: Path, redis: RealRedis
) -> None:
    async with nodes_behind(write, tmp_path, redis) as (nodes, front), trio.open_nursery() as nursery:

        async def dial(host: str, port: int) -> trio.SocketStream:
            assert host == RELAY_NAME
            return await trio.open_tcp_stream("127.0.0.1", front)

        async def served() -> bool:
            with suppress(OSError, trio.BrokenResourceError):
                return (await visit(front)).startswith(b"HTTP/1.1 200 ")
            return False

        async with open_tunnel(f"wss://{RELAY_NAME}", key=KEY, ca_file=tmp_path / "ca.pem", dial=dial) as tunnel:
            nursery.start_soon(greet, tunnel)
            with no_hang():
                await connected(tunnel)
                await eventually(served)
                for _ in range(VISITS):
                    answer = await visit(front)
                    assert answer.startswith(b"HTTP/1.1 200 "), answer
                    assert f"hello {VISITOR}".encode() in answer
                told = {node: await node.stats() for node in nodes}
                (holder,) = [node for node, stats in told.items() if stats is not None and stats.sessions_open]
                at_holder = told[holder]
                assert at_holder is not None
                assert at_holder.fleet is not None
                assert at_holder.fleet.hops_served_total >= VISITS // 3  # the proxy has used all nodes
                holder.program.process.kill()
                await eventually(served)
            nursery.cancel_scope.cancel()


def test_the_files_of_the_nodes_differ_in_their_names_alone() -> None:
    texts = {name: (FLEET / f"{name}.toml").read_text() for name in NODES}
    bodies = {text.partition("[[relay.fleet.nodes]]")[2] for text in texts.values()}
    assert len(bodies) == 1
    assert len({text.partition("[[")[0].replace(name, "NAME") for name, text in texts.items()}) == 1
    for name in NODES:
        config = RelayConfig.load(FLEET / f"{name}.toml")
        assert config.fleet is not None
        assert config.fleet.node == name
        assert {node.name for node in config.fleet.nodes} == {*NODES}


def test_compose_mounts_what_each_node_reads() -> None:
    compose = (FLEET / "compose.yaml").read_text()
    mounted = {*re.findall(r"- (\.{1,2}/.+?):", compose)}
    own = {f"./{name}.{kind}" for name in NODES for kind in ("key", "pem")}  # these are the operator's
    own |= {"./redis.password", "./relay.pem"}
    assert own < mounted
    assert all((FLEET / file).is_file() for file in mounted - own)
    (containerfile,) = {*re.findall(r"dockerfile: (.+)", compose)}
    (context,) = {*re.findall(r"context: (.+)", compose)}
    assert (FLEET / context / containerfile).resolve() == DEPLOY / "Containerfile"
    (subnet,) = re.findall(r"subnet: (.+)", compose)
    config = RelayConfig.load(FLEET / "fra1.toml")
    assert [str(network) for network in config.trust_forwarded_from] == [subnet]
    for name in NODES:
        assert f"\n  {name}:\n" in compose
        assert f"./{name}.toml:/etc/pioneer-tunnel/relay.toml:ro" in compose
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", compose)
    assert int(grace) > config.drain_timeout_ms / 1000


def test_the_password_of_redis_is_no_argument() -> None:
    (line,) = [line for line in (FLEET / "compose.yaml").read_text().splitlines() if "requirepass" in line]
    assert line.strip().startswith("- 'printf ")  # which the shell does itself
    assert line.endswith("| valkey-server -'")


@pytest.mark.parametrize("name", ["haproxy.cfg", "nginx.conf", "prometheus.yml"])
def test_each_node_is_named(name: str) -> None:
    text = (FLEET / name).read_text()
    port = 9100 if name == "prometheus.yml" else 8443
    assert {*re.findall(rf"(\w+):{port}", text)} == {*NODES}


def test_the_unit_of_an_instance_starts_a_command_that_is_understood() -> None:
    unit = (FLEET / "pioneer-relay@.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert command == "/opt/pioneer/bin/pioneer-tunnel relay --config /etc/pioneer-tunnel/%i.toml"
    file = str(FLEET / "fra1.toml")
    context = command_line.commands["relay"].make_context("relay", ["--config", file])
    assert context.params["config"] == FLEET / "fra1.toml"


def test_the_unit_of_an_instance_is_that_of_a_relay_but_for_the_name() -> None:
    def settings(file: Path) -> list[str]:
        return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]

    single, instance = settings(DEPLOY / "pioneer-relay.service"), settings(FLEET / "pioneer-relay@.service")
    assert [line for line in instance if line not in single] == [
        "Description=Relay %i of pioneer-tunnel",
        "ExecStart=/opt/pioneer/bin/pioneer-tunnel relay --config /etc/pioneer-tunnel/%i.toml",
        "RuntimeDirectoryPreserve=yes",
    ]
    assert len(instance) == len(single) + 1


@pytest.mark.slow
@needs("systemd-analyze")
def test_the_unit_of_an_instance_is_right_and_has_few_rights(tmp_path: Path) -> None:
    tried = tmp_path / "pioneer-relay@fra1.service"
    changes = {"/opt/pioneer/bin/pioneer-tunnel": "/bin/true"}
    tried.write_text(changed("fleet/pioneer-relay@.service", **changes))
    verified = subprocess.run(["systemd-analyze", "verify", tried], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(tried)]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout


@needs("promtool")
def test_prometheus_reads_its_file(tmp_path: Path) -> None:
    shutil.copy(FLEET / "prometheus.yml", tmp_path)
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    command = ["promtool", "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Metrics and health checks of a relay and of a gateway, over real connections, as Prometheus reads them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import prometheus_client
import pytest
import trio
from documents import DOCS
from metrics_table import TABLES
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from relay_problems import only_problem_of, relay
from rig import (
    HOST,
    RelayRig,
    eventually,
    no_hang,
    read_all,
    read_until,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
    upload,
)

from pioneer_tunnel import Address, ErrorKind, State, Status, TunnelStats, UnixAddress, __version__
from pioneer_tunnel._model.certificate_status import CertificateStatus
from pioneer_tunnel._model.stats import SessionStats, StreamStats
from pioneer_tunnel.monitoring import collect_metrics, gateway_metrics, serve_metrics
from pioneer_tunnel.monitoring.exposition import Measure
from pioneer_tunnel.relay import ConnectionStats, Relay, RelayStats, RelayTunnelStats, metrics as relay_metrics
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


async def get(
    address: Address | UnixAddress | None, path: str, *headers: str, host: str | None = "localhost", method: str = "GET"
) -> tuple[int, str, str]:
    """Status, Content-Type and body."""
    with no_hang():
        if isinstance(address, UnixAddress):
            stream = await trio.open_unix_socket(address.path)
        else:
            assert address is not None
            stream = await trio.open_tcp_stream(address.host, address.port)
        async with stream:
            lines = [f"{method} {path} HTTP/1.{0 if host is None else 1}", *([] if host is None else [f"Host: {host}"])]
            await stream.send_all("\r\n".join([*lines, *headers, "", ""]).encode())
            head, _, body = (await read_all(stream)).decode().partition("\r\n\r\n")
    kind = head.partition("Content-Type: ")[2].partition("\r\n")[0]
    return int(head.split()[1]), kind, body


def samples(families: Iterable[Metric]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


async def scraped(address: Address | UnixAddress | None) -> Callable[..., float | None]:
    """Scrape as Prometheus does; returns a function that finds a sample."""
    status, kind, body = await get(address, "/metrics", f"Accept: {OPENMETRICS}")
    assert status == 200
    assert kind.startswith(OPENMETRICS)
    found = samples(parse_openmetrics(body))  # type: ignore[no-untyped-call]

    def value(name: str, **labels: str) -> float | None:
        return found.get((f"pioneer_tunnel_{name}", frozenset(labels.items())))

    return value


async def answer(stream: TunnelStream) -> None:
    async with stream:
        await stream.receive_some()
        await stream.send_all(ANSWER)


async def visit(rig: RelayRig, host: str = HOST) -> None:
    async with await rig.visit() as visitor:
        await visitor.send_all(request("Connection: close", host=host))
        await read_all(visitor)


async def test_a_relay_and_its_gateway_count_the_same() -> None:
    async with (
        relay_rig(metrics="127.0.0.1:0") as rig,
        rig.tunnel() as tunnel,
        trio.open_nursery() as nursery,
    ):
        address = await nursery.start(serve_metrics, tunnel, "127.0.0.1:0")
        nursery.start_soon(accept_visitors, tunnel, answer, nursery)
        with no_hang():
            await tunnel.wait_connected()
            for host in (HOST, HOST, "unknown.test"):
                await visit(rig, host)
            await eventually(lambda: rig.relay.stats().streams.open == 0)
            await eventually(lambda: tunnel.stats().streams.open == 0)
        relay, gateway = await scraped(rig.addresses.metrics), await scraped(address)
        sent = 2 * len(request("Connection: close"))
        labels = {"tunnel": "office", "service": ""}
        assert relay("relay_tunnel_from_visitors_bytes_total", **labels) == sent
        assert gateway("gateway_from_visitors_bytes_total", service="") == sent
        assert relay("relay_tunnel_to_visitors_bytes_total", **labels) == 2 * len(ANSWER)
        assert gateway("gateway_to_visitors_bytes_total", service="") == 2 * len(ANSWER)
        assert relay("relay_tunnel_streams_opened_total", **labels) == relay("relay_streams_opened_total") == 2
        assert relay("relay_refusals_total", reason="unknown_host") == 1
        assert relay("relay_tunnel_connected", tunnel="office") == relay("relay_sessions_open") == 1
        assert relay("relay_draining") == 0
        assert gateway("gateway_state", pioneer_tunnel_gateway_state="connected") == 1
        assert gateway("gateway_state", pioneer_tunnel_gateway_state="failed") == 0
        assert relay("build_info", version=__version__) == gateway("build_info", version=__version__) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("accept", "kind"), [("", "text/plain; version=0.0.4"), ("*/*", "text/plain; version=0.0.4"), (OPENMETRICS,) * 2]
)
async def test_the_format_is_the_one_that_is_asked_for(accept: str, kind: str) -> None:
    async with relay_rig(metrics="127.0.0.1:0") as rig:
        status, told, body = await get(rig.addresses.metrics, "/metrics", *([f"Accept: {accept}"] if accept else []))
        assert (status, told.startswith(kind)) == (200, True)
        assert body.endswith("# EOF\n") == (accept == OPENMETRICS)
        parse = parse_openmetrics if accept == OPENMETRICS else parse_text
        found = samples(parse(body))
        assert found[("pioneer_tunnel_relay_connections_limit", frozenset())] > 0
        assert found[("process_open_fds", frozenset())] > 0


async def test_a_tunnel_that_is_removed_has_no_metrics_any_more() -> None:
    async with relay_rig(metrics="127.0.0.1:0") as rig:
        assert (await scraped(rig.addresses.metrics))("relay_tunnel_connected", tunnel="office") == 0
        await rig.apply(tunnels=[attrs.evolve(rig.config.tunnels[0], id="branch")])
        value = await scraped(rig.addresses.metrics)
        assert value("relay_tunnel_connected", tunnel="office") is None
        assert value("relay_tunnel_connected", tunnel="branch") == 0


def test_an_error_kind_and_a_state_are_one_of_many() -> None:
    status = Status(state=State.FAILED, error_kind=ErrorKind.MISSING_KEY, updated_at_unix=0)
    source = _Still(status, TunnelStats(since_unix=1.5, failures_total={"io": 3}))
    found = samples(collect_metrics(source))
    states = {labels: value for (name, labels), value in found.items() if name == "pioneer_tunnel_gateway_state"}
    kinds = {labels: value for (name, labels), value in found.items() if name == "pioneer_tunnel_gateway_error"}
    assert (len(states), sum(states.values())) == (len(State), 1)
    assert (len(kinds), sum(kinds.values())) == (len(ErrorKind), 1)
    assert kinds[frozenset({("pioneer_tunnel_gateway_error", "missing_key")})] == 1
    assert found[("pioneer_tunnel_gateway_failures_total", frozenset({("error_kind", "io")}))] == 3
    assert found[("pioneer_tunnel_gateway_since_timestamp_seconds", frozenset())] == 1.5


@attrs.frozen
class _Still:
    status: Status
    numbers: TunnelStats

    def stats(self) -> TunnelStats:
        return self.numbers


# Which number is which metric


def numbers(cls: type[attrs.AttrsInstance], sample: Any) -> Iterator[str]:
    """The fields of statistics that are numbers."""
    for field in attrs.fields(cls):
        if isinstance(getattr(sample, field.name), int | float | dict) and field.name != "services":
            yield field.name


class _Reads:
    """Notes which fields are read. It stands in for statistics."""

    def __init__(self, fields: set[str]) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        self._fields.add(name)
        if name == "sessions":
            return (_Reads(self._fields),)
        return _Reads(self._fields) if name in {"connections", "streams"} else 0


def read_by(*tables: tuple[Measure[Any], ...]) -> set[str]:
    fields: set[str] = set()
    for measure in (measure for table in tables for measure in table):
        measure.of(_Reads(fields))
    return fields


CONNECTIONS: Final = ConnectionStats(**dict.fromkeys((field.name for field in attrs.fields(ConnectionStats)), 0))


def test_every_number_of_a_relay_is_a_metric() -> None:
    stats = RelayStats(since_unix=0, draining=False, connections=CONNECTIONS)
    of_relay = {*numbers(RelayStats, stats), *numbers(ConnectionStats, CONNECTIONS)} - {"tunnels"}
    assert of_relay <= read_by(relay_metrics.RELAY)
    assert {*numbers(RelayTunnelStats, RelayTunnelStats())} <= read_by(relay_metrics.TUNNEL)
    assert {*numbers(StreamStats, StreamStats())} <= read_by(relay_metrics.STREAMS)
    assert {"round_trip_ms", "unread_bytes", "unsent_bytes", "suspended"} <= read_by(relay_metrics.TUNNEL)


def test_every_number_of_a_gateway_is_a_metric() -> None:
    assert {*numbers(TunnelStats, TunnelStats(since_unix=0))} <= read_by(gateway_metrics.GATEWAY)
    assert {*numbers(StreamStats, StreamStats())} <= read_by(gateway_metrics.STREAMS)


def test_the_guide_lists_every_metric() -> None:
    guide = (DOCS / "monitoring.md").read_text()
    assert all(table in guide for table in TABLES)


def test_a_round_trip_is_in_seconds() -> None:
    stats = TunnelStats(since_unix=0, sessions=(SessionStats(), SessionStats(round_trip_ms=250.0)))
    found = samples(collect_metrics(_Still(Status(state=State.CONNECTED, updated_at_unix=0), stats)))
    assert found[("pioneer_tunnel_gateway_round_trip_seconds", frozenset())] == 0.25


def test_certificates_have_metrics_by_host() -> None:
    ordered = {"a.test": CertificateStatus(not_after_unix=9), "b.test": CertificateStatus(message="refused")}
    status = Status(state=State.CONNECTED, updated_at_unix=0, certificates=ordered)
    stats = RelayStats(since_unix=0, draining=False, connections=CONNECTIONS)
    for prefix, families in (
        ("gateway", collect_metrics(_Still(status, TunnelStats(since_unix=0)))),
        ("relay", relay_metrics.relay_families(stats, ordered)),
    ):
        found = samples(families)
        name = f"pioneer_tunnel_{prefix}_certificate"
        a, b = (frozenset({("host", host)}) for host in ordered)
        assert found[(f"{name}_expiry_timestamp_seconds", a)] == 9
        assert (f"{name}_expiry_timestamp_seconds", b) not in found
        assert (found[(f"{name}_order_failed", a)], found[(f"{name}_order_failed", b)]) == (0, 1)


# Who may read


async def test_metrics_at_loopback_are_for_loopback_names_and_health_checks_for_all() -> None:
    async with relay_rig(metrics="127.0.0.1:0") as rig:
        address = rig.addresses.metrics
        assert (await get(address, "/metrics", host="evil.test"))[0] == 421
        assert (await get(address, "/metrics", host=None))[0] == 421
        assert (await get(address, "/metrics", method="POST"))[0] == 405
        assert (await get(address, "/nothing"))[0] == 404
        for host in ("evil.test", "localhost", None):
            assert (await get(address, "/-/healthy", host=host))[::2] == (200, "healthy\n")
            assert (await get(address, "/-/ready", host=host))[::2] == (200, "ready\n")
        assert (await get(address, "/-/ready", method="HEAD"))[::2] == (200, "")


async def test_metrics_at_another_address_are_for_every_name(caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig(metrics="0.0.0.0:0") as rig:
        assert isinstance(rig.addresses.metrics, Address)
        address = Address("127.0.0.1", rig.addresses.metrics.port)
        assert (await get(address, "/metrics", host="relay.internal:9100"))[0] == 200
        assert (await get(address, "/report.json", host="relay.internal:9100"))[0] == 404
        assert "have no login" in caplog.text


async def test_the_page_and_metrics_may_share_an_address(tmp_path: Path) -> None:
    shared = f"unix:{tmp_path / 'relay.sock'}"
    async with relay_rig(metrics=shared, dashboard=shared) as rig:
        assert rig.addresses.metrics == rig.addresses.dashboard
        assert (await get(rig.addresses.metrics, "/metrics"))[0] == 200
        assert (await get(rig.addresses.metrics, "/report.json"))[0] == 200
    assert [*tmp_path.iterdir()] == []


async def test_a_relay_that_cannot_have_its_metrics_leaves_nothing(tmp_path: Path) -> None:
    async with relay_rig(metrics="127.0.0.1:0") as rig:
        config = relay_config(metrics=str(rig.addresses.metrics), dashboard=f"unix:{tmp_path / 'relay.sock'}")
        with no_hang(), pytest.raises(OSError, match=f"cannot listen at {rig.addresses.metrics}: "):
            await Relay(config).serve()
    assert [*tmp_path.iterdir()] == []


# Health


async def held_visit(rig: RelayRig) -> trio.SocketStream:
    visitor = await rig.visit()
    await visitor.send_all(upload())
    await eventually(lambda: rig.relay.stats().streams.open == 1)
    return visitor


async def keep(stream: TunnelStream) -> None:
    async with stream:
        await stream.wait_broken()


async def draining(rig: RelayRig, look: Callable[[], Awaitable[None]]) -> None:
    """Look at a relay that drains, with a visitor that stays."""
    async with rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(accept_visitors, tunnel, keep, nursery)
        with no_hang():
            await tunnel.wait_connected()
            visitor = await held_visit(rig)
            nursery.start_soon(rig.relay.drain)
            await eventually(lambda: rig.relay.stats().draining)
            await look()
            await visitor.aclose()
        nursery.cancel_scope.cancel()


async def test_a_relay_that_drains_is_not_ready_and_still_has_metrics() -> None:
    async with relay_rig(metrics="127.0.0.1:0") as rig:

        async def look() -> None:
            assert (await get(rig.addresses.metrics, "/-/ready"))[::2] == (503, "the relay drains\n")
            assert (await get(rig.addresses.metrics, "/-/healthy"))[0] == 200
            assert (await scraped(rig.addresses.metrics))("relay_draining") == 1

        await draining(rig, look)


async def test_the_relay_answers_health_checks_among_visitors() -> None:
    async with relay_rig(health_host="Health.Invalid") as rig:
        ingress = Address("127.0.0.1", rig.addresses.ingress.port)
        for host in ("health.invalid", "health.invalid:80", "HEALTH.invalid."):
            assert (await get(ingress, "/anything", host=host))[::2] == (200, "ready\n")
        assert (await get(ingress, "/", host="health.invalid", method="HEAD"))[::2] == (200, "")
        assert (await get(ingress, "/", host="other.invalid"))[0] == 404
        assert rig.relay.stats().refusals_total == {"unknown_host": 1}
        checks = await rig.visit()  # it has connected when the relay begins to drain
        await eventually(lambda: rig.relay.stats().connections.open == 1)

        async def look() -> None:
            await checks.send_all(request(host="health.invalid"))
            assert (await read_until(checks, b"\r\n")).startswith(b"HTTP/1.1 503 ")
            await checks.aclose()
            with pytest.raises(ConnectionRefusedError):
                await rig.visit()  # other balancers notice by this

        await draining(rig, look)


@pytest.mark.parametrize("host", ["health.test:80", "", "a b", "relay.test", HOST, 5])
def test_health_checks_have_a_host_of_their_own(host: object) -> None:
    table = relay(health_host=host, public_names=["relay.test"], tunnels=[tunnel_entry()])
    assert only_problem_of(table).key == "relay.health_host"


async def test_a_gateway_is_ready_while_it_is_connected() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        address = await nursery.start(serve_metrics, tunnel, "127.0.0.1:0")
        with no_hang():
            await tunnel.wait_connected()
            assert (await get(address, "/-/ready"))[::2] == (200, "ready\n")
            await rig.stop()
            await eventually(lambda: tunnel.status.state is not State.CONNECTED)
        assert (await get(address, "/-/ready"))[::2] == (503, "the tunnel is not connected\n")
        assert (await get(address, "/-/healthy"))[0] == 200
        nursery.cancel_scope.cancel()


# How it is configured


@pytest.mark.parametrize("address", ["9100", "unix:relative", "", 9100, "127.0.0.1"])
def test_metrics_need_an_address(address: object) -> None:
    assert only_problem_of(relay(metrics=address)).key == "relay.metrics"


def test_without_the_package_it_is_named() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from pioneer_tunnel.relay import Relay, RelayConfig\n"
        f"table = {relay()!r}\n"
        "Relay(RelayConfig.from_table(table)); print('without')\n"
        "Relay(RelayConfig.from_table(table | {'metrics': '127.0.0.1:0'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "without\n"
    assert "pip install 'pioneer-tunnel[metrics]'" in run.stderr.splitlines()[-1]


def test_only_what_serves_metrics_imports_the_package() -> None:
    code = "import sys, pioneer_tunnel.relay, pioneer_tunnel.cli; assert 'prometheus_client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert prometheus_client.__name__ in sys.modules

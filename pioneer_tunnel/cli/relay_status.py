"""`relay status`: what a running relay does."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import cattrs
import click
import trio

from .._model.errors import StorageError
from .._model.exception_groups import lone_error_bare
from .._model.stats import SessionStats, StreamStats
from .._model.text import clean_message
from ..relay import FleetStats, RelayTunnelStats, WorkerStats
from ..relay.administration.running import RunningRelay, ask_running
from .arguments import Command
from .quantities import amount, duration
from .relay_options import config_option, errors_name
from .tables import Screen, show_table

__all__ = ["status"]

_INTERVAL: Final = 1.0
_COLUMNS: Final = ["tunnel", "gateway", "visitors", "from them", "to them", "refused"]


@click.command(cls=Command, short_help="Show what a running relay does.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="An object; with --watch, one on each line.")
@click.option("--watch", is_flag=True, help="Show it each second, until interrupted.")
def status(config: Path, as_json: bool, watch: bool) -> None:
    """Show what the relay that runs with a file does: tunnels, sessions, visitors, bytes, refusals.

    It has to run on this machine, as the same user; root may ask every relay. The exit status is 1 if none runs.

    \b
    Examples:
      pioneer-tunnel relay status
      pioneer-tunnel relay status --watch
      pioneer-tunnel relay status --json | jq '.stats.tunnels | keys'
    """
    with errors_name({}):
        if watch:
            trio.run(_watch, config, as_json)
            return
        running = trio.run(ask_running, config)
    if running is None:
        raise click.ClickException(_nobody(config))
    if as_json:
        click.echo(_as_json(running))
    else:
        click.echo(_summary(running))
        show_table(_COLUMNS, _rows(running, _totals))


def _nobody(config: Path) -> str:
    return f"no relay runs with {config} on this machine"


async def _watch(config: Path, as_json: bool) -> None:
    """Until interrupted."""
    with (
        lone_error_bare(),
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        Screen() as screen,  # it leaves the terminal as it was
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_show_again_and_again, config, screen, as_json)
            await anext(signals)
            nursery.cancel_scope.cancel()


async def _show_again_and_again(config: Path, screen: Screen, as_json: bool) -> None:
    before: RunningRelay | None = None
    asked = 0.0
    while True:
        try:
            running, trouble = await ask_running(config), _nobody(config)
        except StorageError as error:  # it ends, perhaps, and another one is started
            running, trouble = None, str(error)
        passed, asked = trio.current_time() - asked, trio.current_time()
        if as_json:
            click.echo(_as_json(running) if running is not None else json.dumps({"error": trouble}))
        elif running is None:
            screen.show(trouble)
        else:
            rates: _Bytes = _no_rates
            if before is not None and before.pid == running.pid:
                rates = _rates(before.stats.tunnels, passed)
            screen.show(_summary(running), _COLUMNS, _rows(running, rates))
        before = running
        await trio.sleep(_INTERVAL)


def _as_json(running: RunningRelay) -> str:
    return json.dumps(cattrs.unstructure(running))


def _summary(running: RunningRelay) -> str:
    stats = running.stats
    up = sum(any(not session.suspended for session in tunnel.sessions) for tunnel in stats.tunnels.values())
    streams, connections = stats.streams, stats.connections
    since = duration(time.time() - stats.since_unix)
    lines = [
        f"process {running.pid}, version {clean_message(running.version)}, up {since}",
        f"tunnels connected: {up} of {len(stats.tunnels)}",
        f"connections: {connections.open} of {connections.limit}",
        f"visitors: {streams.open} now, {streams.opened_total} in all",
        f"bytes from visitors: {amount(streams.from_visitors_bytes_total)}B",
        f"bytes to visitors: {amount(streams.to_visitors_bytes_total)}B",
    ]
    lines += map(_worker, stats.workers)
    if stats.fleet is not None:
        lines += _fleet(stats.fleet)
    if stats.draining:
        lines.append("it drains: it ends with its last visitor")
    if stats.refusals_total:
        lines.append(f"refused: {_refusals(stats.refusals_total)}")
    return "\n".join(lines)


def _worker(worker: WorkerStats) -> str:
    memory = "" if worker.memory_bytes is None else f", {amount(worker.memory_bytes)}B of memory"
    return (
        f"worker {worker.index}{' (drains)' if worker.draining else ''}: process {worker.pid}, version"
        f" {clean_message(worker.version)},"
        f" up {duration(time.time() - worker.since_unix)}, {worker.connections.open} connections,"
        f" {worker.sessions_open} sessions, {worker.streams.open} visitors,"
        f" {duration(worker.cpu_seconds_total)} of processor time{memory}"
    )


def _fleet(fleet: FleetStats) -> list[str]:
    links = [
        f"{name} ({'no link' if round_trip is None else f'{round_trip * 1000:.0f} ms'})"
        for name, round_trip in fleet.nodes.items()
    ]
    answers = "answers" if fleet.redis_reachable else "does not answer"
    lines = [
        f"node {fleet.node}: Redis {answers}, {fleet.unannounced_tunnels} tunnels to announce",
        f"other nodes: {', '.join(links) or 'none'}",
        f"visitors whose streams other nodes carry: {fleet.hops_open} now; carried for them: {fleet.hops_served_total}",
    ]
    if fleet.unconfirmed_seconds is not None:
        confirmed = (
            "Redis says which are revoked"
            if not fleet.unconfirmed_seconds
            else f"not confirmed for {duration(fleet.unconfirmed_seconds)}"
        )
        lines.append(f"signed tunnels in memory: {fleet.signed_tunnels}, {confirmed}")
    return lines


def _refusals(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {clean_message(reason)}" for reason, count in refused.items())


_Bytes: TypeAlias = Callable[[str, StreamStats], tuple[str, str]]


def _totals(_tunnel_id: str, streams: StreamStats) -> tuple[str, str]:
    return f"{amount(streams.from_visitors_bytes_total)}B", f"{amount(streams.to_visitors_bytes_total)}B"


def _no_rates(_tunnel_id: str, _streams: StreamStats) -> tuple[str, str]:
    """Before there are two times to compare."""
    return "-", "-"


def _rates(before: Mapping[str, RelayTunnelStats], seconds: float) -> _Bytes:
    """Bytes in a second, since the last time."""

    def rates(tunnel_id: str, streams: StreamStats) -> tuple[str, str]:
        old = before[tunnel_id].streams if tunnel_id in before else StreamStats()
        return tuple(  # type: ignore[return-value]
            f"{amount(max(new - last, 0) / seconds)}B/s"
            for new, last in (
                (streams.from_visitors_bytes_total, old.from_visitors_bytes_total),
                (streams.to_visitors_bytes_total, old.to_visitors_bytes_total),
            )
        )

    return rates


def _rows(running: RunningRelay, of_bytes: _Bytes) -> list[list[str]]:
    return [
        [
            tunnel_id,
            ", ".join(map(_gateway, tunnel.sessions)) or "not connected",
            f"{tunnel.streams.open} ({tunnel.streams.opened_total})",
            *of_bytes(tunnel_id, tunnel.streams),
            str(sum(tunnel.refusals_total.values())),
        ]
        for tunnel_id, tunnel in running.stats.tunnels.items()
    ]


def _gateway(session: SessionStats) -> str:
    state = "has lost its link" if session.suspended else "draining" if session.draining else ""
    since = duration(time.time() - session.since_unix)
    peer = clean_message(session.peer or "connected")
    return f"{peer} {state}" if state else f"{peer} for {since}"

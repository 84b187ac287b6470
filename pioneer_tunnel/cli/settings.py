"""The commands `status`, `enable` and `disable`, and `key`: they speak to a running gateway, or change its files."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import trio

from .._model.errors import InvalidSettingsError, MissingKeyError, StorageError
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._model.status import ErrorKind, State, Status
from ..gateway.control import ReachedGateway, reach_gateway
from ..gateway.planning import effective_config
from ..gateway.remote_access import RemoteAccess
from ..gateway.transport import Transport
from .arguments import STDIN, Command
from .exit_codes import EXIT_CODES
from .gateway_options import GatewayFiles, gateway_options
from .keys import KEY_FILE, key_source
from .status_lines import StatusLines

__all__ = ["disable", "enable", "key_commands", "status"]

SETTLE_SECONDS: Final = 15.0
"""Seconds that `enable` and `key set` wait for the tunnel to come up or to fail."""

_POLL_SECONDS: Final = 0.2
_SECTION: Final = "remote_access"
_ResultT = TypeVar("_ResultT")

_as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _run(work: Callable[..., Awaitable[_ResultT]], *arguments: Any) -> _ResultT:
    with lone_error_bare():
        return trio.run(work, *arguments)


@click.command(cls=Command)
@gateway_options()
@click.option("--watch", is_flag=True, help="Print each new status of a running gateway as well, until interrupted.")
@_as_json
def status(*, files: GatewayFiles, watch: bool, as_json: bool) -> None:
    """Show whether a gateway's remote access runs, and its settings. The key is never shown.

    With --watch it ends when the gateway does.

    \b
    Examples:
      pioneer-tunnel status --config gateway.toml
      pioneer-tunnel status --config gateway.toml --json
    """
    _run(_show, files.remote_access(), watch, as_json)


async def _show(remote_access: RemoteAccess, watch: bool, as_json: bool) -> None:
    async with reach_gateway(remote_access) as (gateway, running):
        section = (await gateway.call("settings/get"))["settings"][_SECTION]
        _print(section, running=running, as_json=as_json)
        if not watch or not running:
            return
        lines = StatusLines(as_json=as_json, of_options=False, echo=click.echo)
        lines.skip(Status.from_wire(section["status"]))
        try:
            for count in itertools.count():
                lines.catch_up([Status.from_wire((await gateway.notification())["params"]["status"])], count)
        except StorageError as error:  # the gateway has ended, and so does this
            click.echo(str(error), err=True)


def _print(section: dict[str, Any], *, running: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"running": running, _SECTION: section}))
        return
    rows = {
        "gateway": "runs" if running else "does not run",
        "remote access": "enabled" if section["enabled"] else "disabled",
        "relay": f"{section.get('server')}, transport {section.get('transport_detail') or section['transport']}",
        "service": section.get("service_name"),
        "key": "stored" if section["has_key"] else "none; store it with: pioneer-tunnel key set",
    }
    if running:
        now = Status.from_wire(section["status"])
        rows["state"] = StatusLines(as_json=False).line(now)
    for name, value in rows.items():
        click.echo(f"{name + ':':<15}{value}")


@click.command(cls=Command, short_help="Switch a gateway's remote access on.")
@gateway_options()
@_as_json
def enable(*, files: GatewayFiles, as_json: bool) -> None:
    """Switch a gateway's remote access on, and wait for what comes of it.

    \b
    Example:
      pioneer-tunnel enable --config gateway.toml
    """
    _run(_update, files.remote_access(), {"enabled": True}, as_json)


@click.command(cls=Command)
@gateway_options()
@_as_json
def disable(*, files: GatewayFiles, as_json: bool) -> None:
    """Switch a gateway's remote access off.

    \b
    Example:
      pioneer-tunnel disable --config gateway.toml
    """
    _run(_update, files.remote_access(), {"enabled": False}, as_json)


async def _update(
    remote_access: RemoteAccess, update: dict[str, Any], as_json: bool, *, expected: ErrorKind | None = None
) -> None:
    """Change the settings, show them, and end with the status of a failure, unless it is the one that was asked for."""
    async with reach_gateway(remote_access, change=True) as (gateway, running):
        result = await gateway.call("settings/update", {"update": {_SECTION: update}})
        del update  # it may hold the key
        section = result["settings"][_SECTION]
        if running:
            section = await _settled(gateway, section)
        _print(section, running=running, as_json=as_json)
    now = Status.from_wire(section["status"])
    if running and now.state is State.FAILED and now.error_kind is not None and now.error_kind is not expected:
        sys.exit(EXIT_CODES[now.error_kind])


async def _settled(gateway: ReachedGateway, section: dict[str, Any]) -> dict[str, Any]:
    """The settings and the status once it has come up or failed, or after 15 s."""
    with trio.move_on_after(SETTLE_SECONDS):
        while section["status"]["state"] == State.STARTING:
            await trio.sleep(_POLL_SECONDS)
            section = (await gateway.call("settings/get"))["settings"][_SECTION]
    return section


@click.group("key", short_help="Store, delete or identify a gateway's relay key.")
def key_commands() -> None:
    """Store or delete a gateway's relay key, or show what its relay's operator needs to know of it."""


@key_commands.command("set", cls=Command)
@gateway_options()
@click.option("--key-file", type=KEY_FILE, help="A file whose first line is the key; - for standard input.")
@_as_json
def set_(*, files: GatewayFiles, key_file: Path | None, as_json: bool) -> None:
    """Store the relay key. It is asked for on a terminal, else read from standard input. It is never an argument.

    \b
    Examples:
      pioneer-tunnel key set --config gateway.toml
      pioneer-tunnel key set --config gateway.toml < relay-key.txt
    """
    remote_access = files.remote_access()
    native = remote_access.config.effective_transport is Transport.WEBSOCKET
    asked = sys.stdin.isatty()
    read = key_source(key_file if key_file is not None or asked else STDIN, native=native)
    _run(_store, remote_access, read(), as_json)


async def _store(remote_access: RemoteAccess, secret: RelayKey, as_json: bool) -> None:
    await _update(remote_access, {"key": secret.reveal()}, as_json)


@key_commands.command("clear", cls=Command)
@gateway_options()
@_as_json
def clear(*, files: GatewayFiles, as_json: bool) -> None:
    """Delete the relay key. Remote access stays enabled, and fails without it. So a `run` without --stay ends.

    \b
    Example:
      pioneer-tunnel key clear --config gateway.toml
    """
    update = functools.partial(_update, expected=ErrorKind.MISSING_KEY)
    _run(update, files.remote_access(), {"clear_key": True}, as_json)


@key_commands.command("show-id", cls=Command, short_help="Print the public half of the stored key.")
@gateway_options()
@_as_json
def show_id(*, files: GatewayFiles, as_json: bool) -> None:
    """Print the public half of the stored key: what the relay's registry holds. The key itself is never printed.

    \b
    Example:
      pioneer-tunnel key show-id --config gateway.toml
    """
    remote_access = files.remote_access()
    public = _run(functools.partial(_public_key, remote_access, files))
    click.echo(json.dumps({"public_key": public}) if as_json else public)


async def _public_key(remote_access: RemoteAccess, files: GatewayFiles) -> str:
    settings = await remote_access.settings()
    secret = await files.keystore.get(settings.secret_ref)
    if secret is None:
        raise MissingKeyError("no relay key is stored; store it with: pioneer-tunnel key set")
    transport = effective_config(remote_access.config, settings).effective_transport
    if transport is not Transport.WEBSOCKET:
        raise InvalidSettingsError(
            f"a relay of transport {transport} knows the key itself, and no public half; ask its operator for the key"
        )
    problem = secret.why_unusable(native=True)
    if problem is not None:
        raise InvalidSettingsError(problem)
    return str(secret.identity().public_key)

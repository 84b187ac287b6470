"""The command `diagnose`: checks as a table for people, or as JSON for machines. docs/diagnose.md describes both."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, Final, get_args

import click
import trio
from click.core import ParameterSource

from .._model.callbacks import nothing
from .._model.errors import TunnelError
from .._model.exception_groups import lone_error_bare
from .._model.services import FIRST_SERVICE
from .._net.tls.client import SYSTEM_TRUSTS
from ..diagnosis.checks import Check, Name, Outcome, exit_status
from ..diagnosis.diagnose import diagnose as run_checks
from ..gateway.config import RemoteAccessConfig
from ..gateway.runtime_folder import stored_instance
from ..gateway.transport import Transport
from ..transports.rathole.key_mode import KeyMode
from ..websocket import EngineName
from .arguments import Choice, ExistingFile, RelayText, local_servers, read_proxy
from .client_file import ClientCommand, load_client_file
from .expose import expose
from .keys import KEY_FILE, key_source
from .standard_error import write_json_lines

__all__ = ["diagnose"]

_FILE: Final = ExistingFile()
_NAME_WIDTH: Final = max(map(len, Name)) + 2
_OUTCOME_WIDTH: Final = max(map(len, Outcome)) + 2
_NARROWEST: Final = 20
_COLOURS: Final = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILED: "red", Outcome.SKIPPED: None}


def _or_client_file(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        load_client_file(context, option, None)
    return path


@click.command(cls=ClientCommand, keys=expose.params)
@click.argument("local", nargs=-1)
@click.option(
    "--config",
    type=_FILE,
    is_eager=True,
    callback=_or_client_file,
    help="The gateway's TOML file, with [gateway.remote_access].",
)
@click.option(
    "--relay",
    "relays",
    type=RelayText(),
    multiple=True,
    help="ws:// or wss:// URL, or host:port; instead of --config. Of several, the first is checked.",
)
@click.option("--transport", type=Choice(["websocket", "tcp", "tls"]), help="By default websocket, as for expose.")
@click.option("--key-mode", type=Choice([str(mode) for mode in KeyMode]), help="As for expose.")
@click.option("--key-file", type=KEY_FILE, help="As for expose. Without it, no proof is tried.")
@click.option("--ca-file", type=_FILE, help="PEM certificates to trust beside the system's.")
@click.option("--system-trust", type=Choice(SYSTEM_TRUSTS), help="As for expose.")
@click.option("--proxy", callback=read_proxy, help="As for expose.")
@click.option("--proxy-credentials-file", type=_FILE, help="As for expose.")
@click.option("--relay-identity", help="Accept only the relay with this public key (ed25519:...).")
@click.option("--service", "service_name", help="The service label.")
@click.option("--local-ca-file", type=_FILE, help="PEM certificates to trust for a LOCAL with https://.")
@click.option("--proxy-protocol", type=Choice(["v2"]), help="What expose is called with.")
@click.option("--websocket-engine", type=Choice(get_args(EngineName)), help="As for expose.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diagnose(  # noqa: PLR0917  # click passes them by name
    context: click.Context,
    /,
    local: tuple[str, ...],
    config: Path | None,
    relays: tuple[str, ...],
    key_file: Path | None,
    local_ca_file: Path | None,
    websocket_engine: EngineName | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Check each step to the relay, and the gateway at LOCAL. A running gateway is not disturbed.

    Takes what expose takes, also from the environment and from the client file; or a gateway's configuration.

    \b
    Examples:
      pioneer-tunnel diagnose
      pioneer-tunnel diagnose 8000 --relay wss://relay.example.com --key-file key
      pioneer-tunnel diagnose --config gateway.toml

    The exit status is 0 when no check failed, else that of the first one that did: 10 names, 11 tcp, 12 proxy, 13 tls,
    14 interception, 15 captive portal, 16 upgrade, 17 clock, 18 proof, 19 mtu, 20 local gateway.
    """
    if as_json:
        write_json_lines(context.obj)
    named = {key: value for key, value in options.items() if value is not None}
    if relays:
        named["relay_addr"] = relays[0]
    if config is not None:
        # What the environment holds is for another relay.
        given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        if given & {*options, "relays", "local", "local_ca_file"}:
            raise click.UsageError("--config has everything but the key; leave LOCAL and the other options out")
        key_file, named, local, local_ca_file = key_file if "key_file" in given else None, {}, (), None
    if config is None and "relay_addr" not in named:
        raise click.UsageError("name the relay with --relay, or the gateway's file with --config")
    servers = local_servers(local, ca_file=local_ca_file)
    try:
        if config is None:
            settings = RemoteAccessConfig(**{"transport": "websocket"} | named)
        else:
            settings = RemoteAccessConfig.load(config)
            servers = {FIRST_SERVICE: settings.local, **settings.services}
        native = settings.effective_transport is Transport.WEBSOCKET
        key = None if key_file is None else key_source(key_file, native=native)()
        instance = None if config is None else stored_instance(settings.runtime_path)
    except TunnelError as error:
        raise click.ClickException(str(error)) from None
    if not as_json:
        click.echo(f"relay {settings.effective_relay_addr}, transport {settings.effective_transport}\n")
    run = functools.partial(
        run_checks,
        settings,
        key,
        report=nothing if as_json else _print_row,  # JSON is one document, printed at the end
        servers=servers,
        instance=instance,
        engine=websocket_engine,
    )
    try:
        with lone_error_bare():
            checks = trio.run(run)
    except TunnelError as error:
        raise click.ClickException(str(error)) from None
    status = exit_status(checks)
    if as_json:
        click.echo(json.dumps(_to_json(settings, checks, status), indent=2))
    sys.exit(status)


def _print_row(check: Check) -> None:
    """A row of the table. Long texts go on in the column where they began."""
    indent = " " * (_NAME_WIDTH + _OUTCOME_WIDTH)
    width = max(shutil.get_terminal_size().columns - len(indent), _NARROWEST)
    lines = textwrap.wrap(check.detail, width)
    if check.cure is not None:
        lines += textwrap.wrap(check.cure, width, initial_indent="> ", subsequent_indent="  ")
    outcome = click.style(f"{check.outcome:<{_OUTCOME_WIDTH}}", fg=_COLOURS[check.outcome])
    click.echo(f"{check.name:<{_NAME_WIDTH}}{outcome}" + f"\n{indent}".join(lines))


def _to_json(config: RemoteAccessConfig, checks: list[Check], status: int) -> dict[str, Any]:
    return {
        "relay": str(config.effective_relay_addr),
        "transport": str(config.effective_transport),
        "exit_status": status,
        "checks": [check.to_json() for check in checks],
    }

"""`relay add`, `relay remove` and `relay list`: the tunnels in a relay's file."""

from __future__ import annotations

import functools
import json
import re
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import click

from .._model.errors import TunnelError
from .._model.keys import new_relay_key
from .._model.services import ANY_SERVICE, SERVICE_NAMES, is_service_name
from ..relay import Route, TunnelEntry
from ..relay.administration.check import check_file
from ..relay.administration.editing import add_tunnel, remove_tunnel
from ..relay.administration.for_gateways import default_url, expose_command
from ..relay.administration.key_file import key_text, new_key_file
from ..relay.config import RelayConfig
from ..relay.identity import identity_of
from ..relay.tunnels import each_address
from .arguments import Command
from .relay_options import config_option, errors_name
from .tables import show_table

__all__ = ["add", "list_", "remove"]

_STDOUT: Final = "-"
_ONLY_SERVICE: Final = "tcp"
_FILE_NAME: Final = re.compile(r"\w[\w.-]*")
_FOLLOWS: Final = "A relay that runs reads the file within 3 seconds."
_OPTIONS: Final = {
    "id": "NAME",
    "url": "--url",
    "bind_addr": "--bind",
    "service": "--service",
    "services": "SERVICE=WHERE",
    "key": "--public-key",
    "tls": "--passthrough",
}


@click.command(cls=Command, short_help="Add a tunnel to a relay's file, with a key.")
@click.argument("name")
@click.argument("services", nargs=-1, metavar="[SERVICE=WHERE]...")
@config_option
@click.option("--url", help="Where visitors reach it; by default NAME below the relay's own name.")
@click.option("--bind", metavar="HOST:PORT", help="A port of its own, for any protocol. May stand beside --url.")
@click.option("--service", metavar="LABEL", help="The label that the gateway has to name; by default any.")
@click.option("--passthrough", is_flag=True, help="Visitors' TLS ends at the gateway: the relay cannot read it.")
@click.option("--public-key", metavar="KEY", help="The public half of a key that exists (ed25519:...).")
@click.option(
    "--key-file",
    metavar="FILE",
    help="Where the new key goes, by default NAME-key.txt beside the relay's file; - is standard output.",
)
def add(  # noqa: PLR0917  # click passes them by name
    name: str,
    services: tuple[str, ...],
    config: Path,
    url: str | None,
    bind: str | None,
    service: str | None,
    passthrough: bool,
    public_key: str | None,
    key_file: str | None,
) -> None:
    """Add the tunnel NAME to a relay's file, with a key of its own.

    It prints the command for the gateway. A relay that runs has the tunnel within 3 seconds. Comments and order of the
    file stay.

    \b
    Examples:
      pioneer-tunnel relay add office
      pioneer-tunnel relay add office --url https://office.example.com
      pioneer-tunnel relay add ssh --bind 0.0.0.0:2222
      pioneer-tunnel relay add box web=https://box.example.com ssh=0.0.0.0:2222
    """
    if services and (url or bind or passthrough):
        raise click.UsageError("SERVICE=WHERE stands in place of --url, --bind and --passthrough")
    if public_key is not None and key_file is not None:
        raise click.UsageError("--key-file is for a new key; with --public-key there is none")
    with errors_name(_OPTIONS if services else _OPTIONS | {"services": "--bind"}):
        before = RelayConfig.load(config)
        if any(tunnel.id == name for tunnel in before.tunnels):
            raise click.UsageError(f"NAME: {config} has a tunnel {name!r} already")
        entry: dict[str, Any] = {"id": name} | (
            {"services": [_service(word) for word in services]} if services else _way(before, name, url, bind)
        )
        if service is not None:
            entry["service"] = service
        if passthrough:
            entry["tls"] = "passthrough"
        if public_key is not None:
            entry["key"] = public_key
            _tell(config, add_tunnel(config, entry), key_file=None, to_stderr=False)
            return
        key = new_relay_key()
        entry["key"] = str(key.identity().public_key)
        path = None if key_file == _STDOUT else _key_path(config, name, key_file)
        with nullcontext() if path is None else new_key_file(path, key):
            changed = add_tunnel(config, entry)
    if path is None:
        click.echo(key_text(key), nl=False)
    _tell(config, changed, key_file=path, to_stderr=path is None)


def _service(word: str) -> dict[str, str]:
    name, equals, where = word.partition("=")
    if not equals or not (is_service_name(name) or name == ANY_SERVICE) or not where:
        raise click.UsageError(
            f"SERVICE=WHERE: write a name, '=', and a URL or host:port; a name has {SERVICE_NAMES}; or it is '*'"
        )
    return {"name": name, "url" if "://" in where else "bind_addr": where}


def _way(config: RelayConfig, name: str, url: str | None, bind: str | None) -> dict[str, Any]:
    """How visitors come to a tunnel with a single service."""
    if bind is not None:
        # A port without a URL belongs to a service: the relay tells the gateway the address.
        return (
            {"services": [{"name": _ONLY_SERVICE, "bind_addr": bind}]}
            if url is None
            else {"url": url, "bind_addr": bind}
        )
    if url is None:
        found = default_url(config, name)
        if found is None:
            raise click.UsageError(
                f"say where visitors reach it, with --url or --bind: {name!r} and {config.public_names[0]} make no host"
            )
        url = str(found)
    return {"url": url}


def _key_path(config: Path, name: str, written: str | None) -> Path:
    if written is not None:
        return Path(written)
    if not _FILE_NAME.fullmatch(name):
        raise click.UsageError(f"{name!r} is no name for a file; name the key's file with --key-file")
    return config.absolute().parent / f"{name}-key.txt"


def _tell(path: Path, config: RelayConfig, *, key_file: Path | None, to_stderr: bool) -> None:
    """Tell what was added, what is wrong with it, and what to run at the gateway."""
    entry = config.tunnels[-1]
    say = functools.partial(click.echo, err=to_stderr)
    say(f"added {entry.id!r} to {path}: visitors come to {', '.join(_where(route) for route in entry.routes)}")
    place = f"relay.tunnels[{len(config.tunnels) - 1}]"
    for finding in check_file(path):
        if finding.key.startswith(place):
            say(f"{finding.severity}: {finding}")
    if key_file is not None:
        say(f"Its key is in {key_file}: move this file to the gateway. The relay does not need it.")
    try:
        identity = identity_of(config)
    except TunnelError as error:
        identity = None
        say(f"warning: the command below does not pin the relay: {error}")
    command = expose_command(
        config,
        entry,
        identity=None if identity is None else identity.public_key,
        key_file="KEY-FILE" if key_file is None else key_file.name,
    )
    say(f"At the gateway, run this with the port of the local server in place of 8000:\n\n  {command}\n")
    say(_FOLLOWS)


@click.command(cls=Command)
@click.argument("name")
@config_option
def remove(name: str, config: Path) -> None:
    """Remove the tunnel NAME from a relay's file.

    In a relay that runs, its gateway and its visitors are cut off within 3 seconds. It prints the lines that it has
    removed, with the comments that touch them.

    \b
    Example:
      pioneer-tunnel relay remove office
    """
    with errors_name(_OPTIONS):
        removed = remove_tunnel(config, name)
    click.echo(f"removed from {config}:\n\n{textwrap.indent(removed.strip(), '  ')}\n\n{_FOLLOWS}")


@click.command("list", cls=Command)
@config_option
@click.option("--json", "as_json", is_flag=True, help="An array of objects.")
def list_(config: Path, as_json: bool) -> None:
    """List the tunnels in a relay's file.

    \b
    Examples:
      pioneer-tunnel relay list
      pioneer-tunnel relay list --json | jq -r '.[].id'
    """
    with errors_name({}):
        relay = RelayConfig.load(config)
    if as_json:
        click.echo(json.dumps([_as_object(entry) for entry in relay.tunnels]))
    elif relay.tunnels:
        show_table(
            ["tunnel", "service", "visitors come to", "TLS ends at", "keys"],
            [
                [entry.id, route.service or "", _where(route), _tls_ends(relay, route), str(len(entry.valid_keys))]
                for entry in relay.tunnels
                for route in entry.routes
            ],
        )
    else:
        click.echo(f"{config} has no tunnels; 'pioneer-tunnel relay add NAME' adds one", err=True)


def _as_object(entry: TunnelEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "keys": [str(key) for key in entry.valid_keys],
        "service_label": entry.service,
        "takeover": str(entry.takeover),
        "services": [
            {
                "name": route.service,
                "url": None if route.url is None else str(route.url),
                "bind_addr": [str(address) for address in each_address(route.bind_addr)],
                "tls": route.tls,
                "access_rules": route.access is not None,
            }
            for route in entry.routes
        ],
    }


def _where(route: Route) -> str:
    bound = ", ".join(map(str, each_address(route.bind_addr)))
    if route.url is None:
        return bound
    return f"{route.url} ({bound})" if bound else str(route.url)


def _tls_ends(config: RelayConfig, route: Route) -> str:
    if route.passes_tls:
        return "gateway"
    if route.bind_addr is not None:
        return ""
    return "relay" if config.ingress_tls else "proxy" if config.trust_forwarded_from else "no TLS"

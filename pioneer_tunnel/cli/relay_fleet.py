"""`relay fleet`: keys of nodes and of the operator, and the tunnels that the operator signs.

The operator's key signs. It stays with the operator, for example on a laptop that reaches Redis. No node needs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import trio

from .._model.errors import InvalidSettingsError
from .._model.exception_groups import lone_error_bare
from .._model.keys import PublicKey, SigningIdentity, new_relay_key
from .._model.services import ANY_SERVICE, is_service_name
from ..relay.administration.fleet_file import OPERATOR_FILE, FleetFile, tables_in, write_node_key, write_operator_key
from ..relay.administration.key_file import key_text, new_key_file
from ..relay.fleet.config import a_node_name
from ..relay.fleet.keys import operator_identity
from ..relay.fleet.published import Published, RedisUnreachable, connected
from ..relay.fleet.publishing import publish as publish_one, published_tunnels, revoke as revoke_one
from ..relay.fleet.signed import MOST_VALID, SignedEntry, publishable
from .arguments import Command, ExistingFile
from .quantities import duration
from .relay_options import config_option, errors_name
from .tables import show_table

__all__ = ["fleet"]

_T = TypeVar("_T")
_DAY: Final = 86_400
_DAYS: Final = 90
_STDOUT: Final = "-"
_OPTIONS: Final = {
    "id": "NAME",
    "url": "--url",
    "service": "--service",
    "services": "SERVICE=URL",
    "key": "--public-key",
    "tls": "--passthrough",
}

_folder_option: Final = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path(),
    help="Where the files go; by default the current folder.",
)
_key_option: Final = click.option(
    "--operator-key",
    type=ExistingFile(),
    metavar="FILE",
    help=f"The operator's private key; by default {OPERATOR_FILE} beside the file of --config.",
)
_json_option: Final = click.option("--json", "as_json", is_flag=True, help="An object.")


@click.group(short_help="Keys, tunnels and state of a fleet of relays.")
def fleet() -> None:
    """Keys, tunnels and state of a fleet: several relays that work as one.

    The commands but 'key' need the table [relay.fleet] of a file, of which redis, redis_password_file, redis_ca_file
    and operator_key are used.
    """


@fleet.command(cls=Command, short_help="Make the key of a node, or of the operator.")
@click.option("--node", metavar="NAME", help="Make the key of this node, and a certificate for the other nodes.")
@click.option("--operator", is_flag=True, help="Make the operator's key, which signs tunnels.")
@_folder_option
@_json_option
def key(node: str | None, operator: bool, folder: Path, as_json: bool) -> None:
    """Make the key of a node, or of the operator. A file that exists is not replaced.

    \b
    Examples:
      pioneer-tunnel relay fleet key --node fra1
      pioneer-tunnel relay fleet key --operator
    """
    if operator is (node is not None):
        raise click.UsageError("write --node NAME or --operator")
    with errors_name({}):
        if node is None:
            path, public = write_operator_key(folder)
            made = {"key_file": str(path), "operator_key": str(public)}
            text = (
                f"wrote {path}, which signs tunnels: keep it off the nodes. In the file of each node, and in yours:\n\n"
                f'  [relay.fleet]\n  operator_key = "{public}"\n'
            )
        else:
            try:
                a_node_name(None, None, node)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--node") from None
            key_file, certificate = write_node_key(node, folder)
            made = {"node": node, "key_file": str(key_file), "certificate": str(certificate)}
            text = (
                f"wrote {key_file}, for the node alone, and {certificate}, for all others.\n\nIn the file of {node}:\n"
                f'\n  [relay.fleet]\n  node = "{node}"\n  key_file = "{key_file.name}"\n\nIn the files of all nodes:\n'
                f'\n  [[relay.fleet.nodes]]\n  name = "{node}"\n  address = "HOST:7300"\n'
                f'  certificate = "{certificate.name}"\n'
            )
    click.echo(json.dumps(made) if as_json else text)


@fleet.command(cls=Command, short_help="Sign a tunnel, and publish it to all nodes.")
@click.argument("name", required=False)
@click.argument("services", nargs=-1, metavar="[SERVICE=URL]...")
@config_option
@_key_option
@click.option("--url", help="Where visitors reach it.")
@click.option("--service", metavar="LABEL", help="The label that the gateway has to name; by default any.")
@click.option("--passthrough", is_flag=True, help="Visitors' TLS ends at the gateway: the relay cannot read it.")
@click.option("--public-key", metavar="KEY", help="The public half of a key that exists (ed25519:...).")
@click.option(
    "--key-file",
    metavar="FILE",
    help="Where the new key of the gateway goes, by default NAME-key.txt; - is standard output.",
)
@click.option("--tunnels", type=ExistingFile(), metavar="FILE", help="Publish all [[relay.tunnels]] of this file.")
@click.option(
    "--valid-days",
    type=click.IntRange(1, MOST_VALID // _DAY),
    default=_DAYS,
    show_default=True,
    help="Until when it is valid, unless it is published again.",
)
@_json_option
def publish(  # noqa: PLR0917  # click passes them by name
    name: str | None,
    services: tuple[str, ...],
    config: Path,
    operator_key: Path | None,
    url: str | None,
    service: str | None,
    passthrough: bool,
    public_key: str | None,
    key_file: str | None,
    tunnels: Path | None,
    valid_days: int,
    as_json: bool,
) -> None:
    """Sign the tunnel NAME, with a key of its own, and publish it: every node serves it at once.

    To change a tunnel, or to make it valid for longer, publish it again, with --public-key.

    \b
    Examples:
      pioneer-tunnel relay fleet publish office --url https://office.example.com
      pioneer-tunnel relay fleet publish box web=https://box.example.com api=https://api.example.com
      pioneer-tunnel relay fleet publish --tunnels tunnels.toml --valid-days 30
    """
    if (tunnels is None) is (name is None):
        raise click.UsageError("write NAME, or --tunnels FILE")
    if tunnels is not None and (url or service or passthrough or public_key or key_file):
        raise click.UsageError("--tunnels FILE has all that there is to say; leave the other options out")
    if services and (url or passthrough):
        raise click.UsageError("SERVICE=URL stands in place of --url and --passthrough")
    if public_key is not None and key_file is not None:
        raise click.UsageError("--key-file is for a new key; with --public-key there is none")
    with errors_name(_OPTIONS):
        file, operator = _operator(config, operator_key)
        new_key = None
        if name is None:
            assert tunnels is not None
            tables = tables_in(tunnels)
        else:
            new_key = new_relay_key() if public_key is None else None
            public = public_key if new_key is None else str(new_key.identity().public_key)
            table: dict[str, Any] = {"id": name, "key": public}
            if services:
                table["services"] = [_service(word) for word in services]
            elif url is None:
                raise click.UsageError("say where visitors reach it, with --url or SERVICE=URL")
            else:
                table["url"] = url
            tables = [table | _more(service, passthrough)]
            publishable(tables[0])
        path = Path(key_file or f"{name}-key.txt") if new_key is not None and key_file != _STDOUT else None

        async def work(published: Published) -> list[SignedEntry]:
            return [
                await publish_one(published, operator, table, now=time.time(), valid=valid_days * _DAY)
                for table in tables
            ]

        with nullcontext() if path is None or new_key is None else new_key_file(path, new_key):
            entries = _with_redis(file, config, work)
    if as_json:
        made = [_as_object(entry) for entry in entries]
        click.echo(json.dumps({"published": made, "key_file": None if path is None else str(path)}))
    else:
        for entry in entries:
            click.echo(f"published {entry.id!r}, valid until {_date(entry.not_after)}", err=path is None)
        if path is not None:
            click.echo(f"The key of its gateway is in {path}: move this file there. Nobody else needs it.")
    if new_key is not None and path is None:
        click.echo(key_text(new_key), nl=False)


@fleet.command(cls=Command, short_help="Revoke a tunnel at all nodes.")
@click.argument("name")
@config_option
@_key_option
@click.option("--anyway", is_flag=True, help="Also if Redis has no such tunnel: it may have lost it.")
@_json_option
def revoke(name: str, config: Path, operator_key: Path | None, anyway: bool, as_json: bool) -> None:
    """Revoke the tunnel NAME: every node ends its sessions at once, and keeps in mind that it was revoked.

    To revoke one key of a tunnel, publish the tunnel again, with another one.

    \b
    Example:
      pioneer-tunnel relay fleet revoke office
    """
    with errors_name(_OPTIONS):
        file, operator = _operator(config, operator_key)

        async def work(published: Published) -> SignedEntry | None:
            if not anyway:
                there = (await published_tunnels(published, operator.public_key)).entries.get(name)
                if there is None or there.tunnel is None:
                    return None
            return await revoke_one(published, operator, name, now=time.time())

        entry = _with_redis(file, config, work)
    if entry is None:
        raise click.ClickException(f"there is no published tunnel {name!r}; if Redis has lost it, add --anyway")
    if as_json:
        click.echo(json.dumps(_as_object(entry)))
    else:
        click.echo(
            f"revoked {name!r}. Nodes that reach Redis end its sessions within seconds; others when they reach it again"
            " or after unconfirmed_ms."
        )


@fleet.command(cls=Command, short_help="Show what is published.")
@config_option
@_json_option
def status(config: Path, as_json: bool) -> None:
    """Show the published tunnels. It needs operator_key in the file, and no private key.

    What a node does, and whether it reaches Redis and the other nodes, 'relay status' tells on its machine.

    \b
    Examples:
      pioneer-tunnel relay fleet status
      pioneer-tunnel relay fleet status --json | jq '.tunnels[].id'
    """
    with errors_name({}):
        file = FleetFile.load(config)
        operator = file.operator_key
        if operator is None:
            raise InvalidSettingsError(
                f"{config}: relay.fleet.operator_key is missing; nothing is published without it"
            )

        async def work(published: Published) -> Mapping[str, Any]:
            found = await published_tunnels(published, operator)
            return {
                "tunnels": [_as_object(entry) for _, entry in sorted(found.entries.items())],
                "forged": found.forged,
            }

        found = _with_redis(file, config, work)
    if as_json:
        click.echo(json.dumps(found))
        return
    now = time.time()
    show_table(
        ["tunnel", "visitors come to", "keys", "signed", "valid for"],
        [
            [
                one["id"],
                ", ".join(one["urls"]) if not one["revoked"] else "revoked",
                str(len(one["keys"])),
                _date(one["signed_unix"]),
                duration(one["not_after_unix"] - now) if one["not_after_unix"] > now else "it has ended",
            ]
            for one in found["tunnels"]
        ],
    )
    if found["forged"]:
        click.echo(f"{found['forged']} entries are not signed with operator_key; nodes ignore them", err=True)


def _operator(config: Path, operator_key: Path | None) -> tuple[FleetFile, SigningIdentity]:
    """The file, and the operator's private key, which has to belong to it."""
    file = FleetFile.load(config)
    path = operator_key or config.absolute().parent / OPERATOR_FILE
    operator = operator_identity(path)
    if file.operator_key is not None and file.operator_key != operator.public_key:
        raise click.UsageError(
            f"--operator-key: {path} is not the private half of operator_key in {config}; nodes would ignore all that"
            " it signs"
        )
    return file, operator


def _with_redis(file: FleetFile, config: Path, work: Callable[[Published], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        with lone_error_bare():
            async with connected(file.access(config.absolute().parent)) as published:
                return await work(published)

    try:
        return trio.run(run)
    except RedisUnreachable as error:
        raise click.ClickException(f"redis at {file.redis} cannot be used: {error}") from error


def _service(word: str) -> dict[str, str]:
    name, equals, url = word.partition("=")
    if not equals or not (is_service_name(name) or name == ANY_SERVICE) or "://" not in url:
        raise click.UsageError("SERVICE=URL: write a name, '=', and a URL; a port belongs in the files of the nodes")
    return {"name": name, "url": url}


def _more(service: str | None, passthrough: bool) -> dict[str, str]:
    return ({} if service is None else {"service": service}) | ({"tls": "passthrough"} if passthrough else {})


def _as_object(entry: SignedEntry) -> dict[str, Any]:
    routes = () if entry.tunnel is None else entry.tunnel.routes
    keys: tuple[PublicKey, ...] = () if entry.tunnel is None else entry.tunnel.valid_keys
    return {
        "id": entry.id,
        "revoked": entry.tunnel is None,
        "urls": [str(route.url) for route in routes],
        "keys": [str(key) for key in keys],
        "serial": entry.serial,
        "signed_unix": entry.serial // 1000,
        "not_after_unix": entry.not_after,
    }


def _date(unix: float) -> str:
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d}"

"""The commands: `relay`, `relay new-key`, `relay new-identity`, `expose`, `diagnose`."""

from __future__ import annotations

import functools
import logging
import secrets
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal, get_args

import click
import trio

from .._model.addresses import normal_audience
from .._model.errors import TunnelError
from .._model.keys import RelayKey, SigningIdentity, new_relay_key
from .._model.proxies import Direct, Proxy
from .._model.services import FIRST_SERVICE
from .._model.text import redact_reason
from .._net.descriptor_limit import raise_descriptor_limit
from .._net.tls.certificate import Certificate
from .._net.tls.client import SYSTEM_TRUSTS, SystemTrust, client_tls
from .._version import __version__
from .._wire.links import MOST_LINKS
from ..access.guard import check_files
from ..access.rules import Access
from ..access_log.entry import AccessLogFormat
from ..access_log.writer import AccessLog
from ..certificates.config import AcmeConfig
from ..relay import Relay
from ..relay.handover import Predecessor
from ..relay.inherited import from_systemd
from ..relay.reload import ConfigFile
from ..transports.rathole.key_mode import KeyMode
from ..transports.services import Services
from ..tunnel.accepting import forward_visitors
from ..tunnel.forward import first_local
from ..tunnel.tunnel import DEFAULT_SERVICE, Tunnel, open_tunnel
from ..websocket import EngineName
from .acme import with_acme
from .arguments import Choice, Command, Commands, ExistingFile, local_servers, read_key, read_proxy
from .diagnose import diagnose
from .exposure import Exposure
from .relay_process import RelayProcess
from .signals import run_until_stopped
from .standard_error import write_json_lines
from .status_lines import StatusLines

__all__ = ["pioneer_tunnel"]

_log: Final = logging.getLogger("pioneer_tunnel.cli")
_FILE: Final = ExistingFile()
_websocket_engine: Final = click.option(
    "--websocket-engine",
    type=Choice(get_args(EngineName)),
    help="What speaks WebSocket; by default the fastest that is installed.",
)

_log_format: Final = click.option(
    "--log-format",
    type=Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How log lines are written.",
)


@click.group(cls=Commands)
@click.version_option(__version__, prog_name="pioneer-tunnel")
@click.option("-v", "--verbose", is_flag=True, help="Log more. Never logs a key.")
@click.pass_context
def pioneer_tunnel(context: click.Context, verbose: bool) -> None:
    """Reach a gateway behind NAT through a relay."""
    raise_descriptor_limit()
    level = logging.DEBUG if verbose else logging.INFO
    context.obj = handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(message)s", handlers=[handler])


pioneer_tunnel.add_command(diagnose)


@pioneer_tunnel.group(invoke_without_command=True)
@click.option("--config", type=_FILE, help="The relay's TOML file, with [relay] and [[relay.tunnels]].")
@_websocket_engine
@_log_format
@click.pass_context
def relay(context: click.Context, config: Path | None, websocket_engine: EngineName | None, log_format: str) -> None:
    """Run a relay until it is interrupted.

    Its tunnels follow the file: it is read again when it changes, and on SIGHUP, which also reopens the access log.
    SIGUSR2 starts a successor, which
    takes over without refusing a connection. SIGINT and SIGTERM let visitors finish; a second one ends at once.
    """
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise click.UsageError("name the relay's file with --config FILE")
    if log_format == "json":
        write_json_lines(context.obj)
    try:
        file = ConfigFile(config)
        predecessor = Predecessor.from_environment()
        inherited = from_systemd() if predecessor is None else predecessor.inherited
        server = Relay(file.load(), engine=websocket_engine, inherited=inherited)
        process = RelayProcess(server, file, predecessor)
        run_until_stopped(process.run, process.stop)
    except TunnelError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from error


@relay.command("new-key", cls=Command)
def new_key() -> None:
    """Print a fresh key on the first line, and on the second what the relay's registry needs to know of it.

    The first line is the secret: it goes to the gateway, and nowhere else.
    """
    key = new_relay_key()
    click.echo(key.reveal())
    click.echo(key.identity().public_key)


@relay.command("new-identity", cls=Command)
def new_identity() -> None:
    """Print a fresh identity for a relay: the private seed on the first line, what gateways pin on the second.

    The first line is the secret: it goes to the file that identity_key_file names.
    """
    seed = secrets.token_bytes(32)
    click.echo(seed.hex())
    click.echo(SigningIdentity.from_seed(seed).public_key)


@pioneer_tunnel.command(cls=Command)
@click.argument("local", nargs=-1, required=True)
@click.option(
    "--relay",
    "relay_addresses",
    required=True,
    multiple=True,
    help="ws:// or wss:// URL, or host:port (for wss, tcp, tls). May be repeated for several relays.",
)
@click.option(
    "--links",
    type=click.IntRange(1, MOST_LINKS),
    help="How many links to keep; by default one to each relay.",
)
@click.option(
    "--transport",
    type=Choice(["websocket", "tcp", "tls"]),
    default="websocket",
    show_default=True,
    help="tcp and tls reach a Pioneer Relay or rathole.",
)
@click.option(
    "--key-mode",
    type=Choice([str(mode) for mode in KeyMode]),
    default=str(KeyMode.TOKEN_ROUTING),
    show_default=True,
    help="How a relay of transport tcp or tls knows the key.",
)
@click.option("--key-file", type=_FILE, required=True, help="A file whose first line is the relay key.")
@click.option("--ca-file", type=_FILE, help="PEM certificates to trust beside the system's.")
@click.option(
    "--system-trust",
    type=Choice(SYSTEM_TRUSTS),
    default="openssl",
    show_default=True,
    help="Whom TLS to the relay trusts: the files of OpenSSL, or the operating system (extra truststore).",
)
@click.option(
    "--proxy",
    callback=read_proxy,
    help="http://, https:// or socks5:// URL of a proxy, or none; by default that of HTTPS_PROXY.",
)
@click.option("--proxy-credentials-file", type=_FILE, help="A file with the line user:password for the proxy.")
@click.option("--relay-identity", help="Accept only the relay with this public key (ed25519:...).")
@click.option("--service", default=DEFAULT_SERVICE, show_default=True, help="The service label.")
@click.option(
    "--heartbeat",
    type=click.FloatRange(1, 60),
    help="Seconds of silence after which the link is pinged, if the relay's are more.",
)
@click.option("--tls-certificate", type=_FILE, help="End visitors' TLS with this, where the relay passes it through.")
@click.option("--tls-private-key", type=_FILE, help="The certificate's private key.")
@with_acme
@click.option("--local-ca-file", type=_FILE, help="PEM certificates to trust for a LOCAL with https://.")
@click.option("--proxy-protocol", type=Choice(["v2"]), help="Tell the local gateway who visits, in this form.")
@click.option(
    "--forwarded-headers",
    is_flag=True,
    help="Set X-Forwarded-For, -Proto, -Host and Forwarded in each request, in place of the visitor's own.",
)
@click.option("--host-header", help="The Host that LOCAL gets, such as localhost:3000.")
@click.option(
    "--raw-service",
    "raw_services",
    multiple=True,
    metavar="NAME",
    help="A service that is not HTTP: its requests are not changed. May be repeated.",
)
@click.option("--allow", multiple=True, metavar="NETWORK", help="Admit visitors from there alone. May be repeated.")
@click.option("--deny", multiple=True, metavar="NETWORK", help="Admit no visitors from there. May be repeated.")
@click.option("--basic-auth", type=_FILE, help="An htpasswd file (htpasswd -B): visitors need a user and a password.")
@click.option("--bearer-tokens", type=_FILE, help="A file with a token on each line: visitors need one of them.")
@click.option("--access-log", type=click.Path(path_type=Path), help="A file for a line of each request; - for stdout.")
@click.option("--access-log-format", type=Choice(["common", "json"]), default="common", show_default=True)
@click.option(
    "--access-log-addresses",
    type=Choice(["full", "short"]),
    default="full",
    show_default=True,
    help="Whether the access log shortens visitors' addresses.",
)
@_websocket_engine
@click.option(
    "--stop-grace-ms",
    type=click.IntRange(0, 600_000),
    default=5000,
    show_default=True,
    help="How long visitors may stay after SIGINT or SIGTERM.",
)
@click.option("--json", "as_json", is_flag=True, help="Status lines (with 'state') and log lines (with 'log') as JSON.")
@_log_format
@click.pass_obj
def expose(  # noqa: PLR0917  # click passes them by name
    log_handler: logging.Handler,
    local: tuple[str, ...],
    relay_addresses: tuple[str, ...],
    links: int | None,
    transport: str,
    key_mode: str,
    key_file: Path,
    ca_file: Path | None,
    system_trust: SystemTrust,
    proxy: Proxy | Direct | None,
    proxy_credentials_file: Path | None,
    relay_identity: str | None,
    service: str,
    heartbeat: float | None,
    tls_certificate: Path | None,
    tls_private_key: Path | None,
    local_ca_file: Path | None,
    proxy_protocol: Literal["v2"] | None,
    forwarded_headers: bool,
    host_header: str | None,
    raw_services: tuple[str, ...],
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    basic_auth: Path | None,
    bearer_tokens: Path | None,
    access_log: Path | None,
    access_log_format: str,
    access_log_addresses: Literal["full", "short"],
    websocket_engine: EngineName | None,
    stop_grace_ms: int,
    as_json: bool,
    acme: AcmeConfig | None,
    log_format: str,
) -> None:
    """Make what listens at LOCAL reachable through a relay, until interrupted.

    LOCAL is a port of this machine, host:port, unix:/path/to/socket, or https://host:port.

    NAME=LOCAL is for a service, where the relay's entry of the tunnel has several: expose web=8000 ssh=127.0.0.1:22

    SIGHUP rereads the key file, and reopens the access log. SIGINT and SIGTERM let visitors finish; a second one ends
    at once.

    Status lines go to standard error. The exit status is 0 after an interruption, 1 after a failure that is final.
    """
    if as_json or log_format == "json":
        write_json_lines(log_handler)
    addresses = local_servers(local, ca_file=local_ca_file)
    if host_header is not None:
        try:
            normal_audience(host_header)
        except ValueError as error:
            raise click.BadParameter(redact_reason(str(error), host_header), param_hint="--host-header") from None
    if not addresses.keys() >= {*raw_services}:
        raise click.UsageError("--raw-service names a service of NAME=LOCAL")
    access = _access(allow, deny, basic_auth, bearer_tokens, transport=transport)
    if access is not None and access.needs_http and raw_services:
        raise click.UsageError("--raw-service is not HTTP, so its visitors cannot send a password or a token")
    services = None if [*addresses] == [FIRST_SERVICE] else Services(addresses)
    if services is not None and transport != "websocket":
        raise click.UsageError("NAME=LOCAL is for a relay of --transport websocket")
    _refuse_idle_options(
        relay_addresses,
        transport,
        tls_to_proxy=isinstance(proxy, Proxy) and proxy.scheme == "https",
        ca_file=ca_file,
        system_trust=system_trust,
        key_mode=key_mode,
        websocket_engine=websocket_engine,
        heartbeat=heartbeat,
    )
    if (tls_certificate is None) != (tls_private_key is None):
        raise click.UsageError("--tls-certificate and --tls-private-key come together")
    if acme is not None and tls_certificate is not None:
        raise click.UsageError("--acme orders the certificate that --tls-certificate names; leave one of them out")
    if acme is not None and transport != "websocket":
        raise click.UsageError("--acme is for a relay of --transport websocket, which says where visitors come in")
    if access_log is None and (access_log_format != "common" or access_log_addresses != "full"):
        raise click.UsageError("--access-log-format and --access-log-addresses are for --access-log")
    log = AccessLog.configured(access_log, AccessLogFormat(access_log_format), access_log_addresses)
    certificate: Certificate | None = None
    lines = StatusLines(as_json=as_json)

    def open_with(key: RelayKey) -> AbstractAsyncContextManager[Tunnel]:
        return open_tunnel(
            relay_addresses,
            key=key,
            links=links,
            service=service,
            ca_file=ca_file,
            system_trust=system_trust,
            proxy=proxy,
            proxy_credentials_file=proxy_credentials_file,
            relay_identity=relay_identity,
            transport=transport,
            key_mode=key_mode,
            heartbeat=heartbeat,
            websocket_engine=websocket_engine,
            local=first_local(addresses),
            services=services,
            proxy_protocol=proxy_protocol,
            acme=acme,
        )

    async def forward_all(tunnel: Tunnel, nursery: trio.Nursery) -> None:
        await forward_visitors(
            tunnel,
            addresses,
            nursery,
            proxy_protocol=proxy_protocol,
            forwarded_headers="set" if forwarded_headers else None,
            host_header=host_header,
            raw_services=raw_services,
            access=access,
            access_log=log,
            certificate=certificate,
        )

    exposure = Exposure(
        open_with,
        forward_all,
        functools.partial(read_key, key_file, native=transport == "websocket"),
        lines,
        stop_grace=stop_grace_ms / 1000,
        access_log=log,
    )
    try:
        if ca_file is not None:
            client_tls(ca_file, system_trust=system_trust)  # what is wrong with it shows before anything is dialled
        if tls_certificate is not None and tls_private_key is not None:
            certificate = Certificate(tls_certificate, tls_private_key)
        run_until_stopped(exposure.run, exposure.stop)
    except TunnelError as error:
        lines.show_failure(error)
        sys.exit(1)


def _access(
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    basic_auth: Path | None,
    bearer_tokens: Path | None,
    *,
    transport: str,
) -> Access | None:
    """The access rules of the options; None if there are none. Their files were read."""
    if not (allow or deny or basic_auth or bearer_tokens):
        return None
    if (allow or deny) and transport != "websocket":
        raise click.UsageError("--allow and --deny need the visitor's address; only --transport websocket brings it")
    try:
        access = Access(allow=allow or None, deny=deny or None, basic_auth=basic_auth, bearer_tokens=bearer_tokens)
        check_files(access)
    except TunnelError as error:
        raise click.ClickException(str(error)) from None
    return access


def _refuse_idle_options(
    relay_addresses: Sequence[str],
    transport: str,
    *,
    tls_to_proxy: bool,
    ca_file: Path | None,
    system_trust: SystemTrust,
    key_mode: str,
    websocket_engine: EngineName | None,
    heartbeat: float | None,
) -> None:
    """Refuse options that would have no effect. Whoever names a CA expects TLS, for example."""
    native = transport == "websocket"
    in_clear = all(address.lower().startswith("ws://") for address in relay_addresses)
    if not tls_to_proxy and (transport == "tcp" or (native and in_clear)):
        wanted = "a wss:// address" if native else "--transport tls"
        for option, given in (("--ca-file", ca_file is not None), ("--system-trust", system_trust != "openssl")):
            if given:
                raise click.UsageError(f"{option} is for TLS, and this relay is dialled without TLS; write {wanted}")
    if native and key_mode != KeyMode.TOKEN_ROUTING:
        raise click.UsageError("--key-mode is for a relay of --transport tcp or tls")
    if not native and websocket_engine is not None:
        raise click.UsageError("--websocket-engine is for a relay of --transport websocket")
    if not native and heartbeat is not None:
        raise click.UsageError("--heartbeat is for a relay of --transport websocket")

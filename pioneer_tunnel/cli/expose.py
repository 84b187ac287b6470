"""The command `expose`: a tunnel to local servers, without a gateway's configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal, get_args

import click
import trio
from click.core import ParameterSource

from .._model.addresses import RelayAddress, is_loopback, normal_audience
from .._model.errors import TunnelError
from .._model.keys import RelayKey
from .._model.proxies import Direct, Proxy
from .._model.services import FIRST_SERVICE
from .._model.text import redact_reason, shown
from .._net.tls.certificate import Certificate
from .._net.tls.client import SYSTEM_TRUSTS, SystemTrust, client_tls
from .._wire.links import MOST_LINKS
from ..access.guard import check_files
from ..access.rules import Access
from ..access_log.entry import AccessLogFormat
from ..access_log.writer import AccessLog
from ..certificates.config import AcmeConfig
from ..monitoring.address import SiteAddress
from ..transports.rathole.key_mode import KeyMode
from ..transports.services import Services
from ..tunnel.accepting import forward_visitors
from ..tunnel.forward import first_local
from ..tunnel.tunnel import DEFAULT_SERVICE, Tunnel, open_tunnel
from ..websocket import EngineName
from .acme import with_acme
from .arguments import (
    Choice,
    ExistingFile,
    RelayText,
    local_servers,
    log_format_option,
    read_proxy,
    read_site_address,
)
from .client_file import ClientCommand, client_file_option
from .exit_codes import EXIT_CODES
from .exposure import Exposure
from .keys import KEY_FILE, key_source
from .qr import QrCode
from .signals import run_until_stopped
from .standard_error import write_json_lines
from .status_lines import StatusLines

__all__ = ["expose"]

_FILE: Final = ExistingFile()


@click.command(cls=ClientCommand, short_help="Make what listens at LOCAL reachable through a relay.")
@click.argument("local", nargs=-1, required=True)
@client_file_option
@click.option(
    "--relay",
    "relay_addresses",
    type=RelayText(),
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
@click.option(
    "--key-file",
    type=KEY_FILE,
    help="A file whose first line is the relay key; - for standard input. Without it, you are asked on the terminal.",
)
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
    "--request-id",
    type=Choice(["set", "keep"]),
    help="Give each request an X-Request-ID: a new one, or only where there is none.",
)
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
@click.option(
    "--websocket-engine",
    type=Choice(get_args(EngineName)),
    help="What speaks WebSocket; by default the fastest that is installed.",
)
@click.option(
    "--stop-grace-ms",
    type=click.IntRange(0, 600_000),
    default=5000,
    show_default=True,
    help="How long visitors may stay after SIGINT or SIGTERM.",
)
@click.option(
    "--qr/--no-qr",
    "qr",
    default=None,
    help="The public address as a QR code as well, on a terminal; by default where it fits.",
)
@click.option(
    "--metrics",
    callback=read_site_address,
    metavar="ADDRESS",
    help="Serve metrics and health checks at this host:port or unix:/path (extra metrics).",
)
@click.option("--json", "as_json", is_flag=True, help="Status lines (with 'state') and log lines (with 'log') as JSON.")
@log_format_option
@click.pass_context
def expose(  # noqa: PLR0917  # click passes them by name
    context: click.Context,
    /,
    local: tuple[str, ...],
    relay_addresses: tuple[str, ...],
    links: int | None,
    transport: str,
    key_mode: str,
    key_file: Path | None,
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
    request_id: Literal["set", "keep"] | None,
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
    metrics: SiteAddress | None,
    qr: bool | None,
    as_json: bool,
    acme: AcmeConfig | None,
    log_format: str,
) -> None:
    """Make what listens at LOCAL reachable through a relay, until interrupted.

    LOCAL is a port of this machine, host:port, unix:/path/to/socket, or a http:// or https:// URL of host and port.
    NAME=LOCAL is for a service, where the relay's entry of the tunnel has several.

    \b
    Examples:
      pioneer-tunnel expose 8000 --relay wss://relay.example.com --key-file key
      pioneer-tunnel expose web=8000 ssh=127.0.0.1:22
      pass show relay | pioneer-tunnel expose :8000 --key-file -

    Options may also come from environment variables (PIONEER_TUNNEL_RELAY for --relay) and from the file
    pioneer-tunnel.toml in your configuration folder. SIGHUP rereads the key file, and reopens the access
    log. SIGUSR1 checks the link. SIGINT and SIGTERM let visitors finish; a second one ends at once.

    Status lines go to standard error. The exit status is 0 after an interruption; after a failure that is final it
    names the error kind.
    """
    if as_json or log_format == "json":
        write_json_lines(context.obj)
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
    if context.get_parameter_source("transport") is ParameterSource.DEFAULT:
        _ask_for_scheme(relay_addresses)
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
    lines = StatusLines(as_json=as_json, qr=QrCode(False if as_json else qr))

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
            request_id=request_id,
            raw_services=raw_services,
            access=access,
            access_log=log,
            certificate=certificate,
        )

    exposure = Exposure(
        open_with,
        forward_all,
        key_source(key_file, native=transport == "websocket"),
        lines,
        stop_grace=stop_grace_ms / 1000,
        metrics=metrics,
        access_log=log,
    )
    try:
        if ca_file is not None:
            client_tls(ca_file, system_trust=system_trust)  # what is wrong with it shows before anything is dialled
        if tls_certificate is not None and tls_private_key is not None:
            certificate = Certificate(tls_certificate, tls_private_key)
        run_until_stopped(exposure.run, exposure.stop)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from error
    except TunnelError as error:
        lines.show_failure(error)
        sys.exit(EXIT_CODES[error.kind])


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


def _ask_for_scheme(relay_addresses: Sequence[str]) -> None:
    """Refuse a bare address that is not of this machine: in a gateway's file the same text means no encryption."""
    for text in relay_addresses:
        try:
            address = RelayAddress.parse(text)
        except ValueError:
            continue  # `open_tunnel` explains it
        if address.scheme is None and not is_loopback(address.host):
            raise click.UsageError(
                f"--relay {shown('', address) or '…'} does not say how it is reached: write wss:// before it, or add"
                " --transport tls or tcp for a Pioneer Relay or rathole"
            )


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
    """Refuse options that would have no effect. A user who names a CA expects TLS, for example."""
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

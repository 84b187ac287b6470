"""What is wrong with a relay's file, and with what it names, before a relay starts with it or reads it again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, final

import attrs
import trio
from cryptography import x509

from ..._model.addresses import RelayAddress, is_ip_address
from ..._model.errors import InvalidSettingsError, StorageError, TunnelError, told
from ..._net.tls.certificate import Certificate
from ..._storage import files
from ..._storage.toml_read import FILE_LIMIT
from ..._storage.toml_statements import lines_of_keys
from ...access.guard import check_files
from ...certificates.opening import require_extra
from ..config import RelayConfig, config_of
from ..identity import identity_of
from ..listeners import open_listeners
from ..names import NameBook
from ..tunnels import Route, each_address
from .check_fleet import FleetProblem, problems_of_files, problems_of_redis

__all__ = ["Finding", "check", "check_file"]

_SOON: Final = timedelta(days=14)
_MOST_NAMES: Final = 8
_INDEX: Final = ("[", ".")


@final
@attrs.frozen(kw_only=True)
class Finding:
    """Something that is wrong, or that the operator should know.

    Attributes:
        severity: `error` if a relay does not start or some gateways or visitors cannot come; else `warning`.
        key: the key path in the file; empty for the file as a whole.
        line: the line of the key in the file, from 1; None where it has none.
        message: what is wrong, and what to do.
    """

    severity: Literal["error", "warning"]
    key: str
    line: int | None = None
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


def check_file(path: Path, *, now: datetime | None = None) -> list[Finding]:
    """Read a relay's file as a relay does, and all files that it names. Blocks.

    Args:
        path: the file.
        now: the time at which certificates have to be valid; by default the present.

    Returns:
        The findings, in the order of the file.

    Raises:
        StorageError: the file itself cannot be read.
    """
    content = _read(path)
    _, found = _examine(content, path, now or datetime.now(UTC))
    return _in_order(found, content)


async def check(path: Path, *, running: bool) -> list[Finding]:
    """The same, and try to listen at each address.

    Args:
        path: the file.
        running: whether a relay runs with it, so that some of the addresses are not free.
    """
    content = await trio.to_thread.run_sync(_read, path)
    config, found = await trio.to_thread.run_sync(_examine, content, path, datetime.now(UTC))
    if config is not None:
        found += await _of_addresses(config, running=running)
        if config.fleet_config is not None:
            found += map(_of_problem, await problems_of_redis(config.fleet_config))
    return _in_order(found, content)


def _read(path: Path) -> bytes:
    content = files.read(path, limit=FILE_LIMIT)
    if content is None:
        raise StorageError(f"there is no file {path}")
    return bytes(content)


def _examine(content: bytes, path: Path, now: datetime) -> tuple[RelayConfig | None, list[Finding]]:
    try:
        config = config_of(content, path)
    except InvalidSettingsError as error:
        return None, [Finding(severity="error", key=problem.key, message=told(problem)) for problem in error.problems]
    return config, [
        *_of_modes(path),
        *_of_identity(config),
        *_of_certificate(config, now),
        *_of_acme(config),
        *_of_names(config),
        *_of_access(config),
        *_of_fleet(config),
    ]


def _in_order(found: Iterable[Finding], content: bytes) -> list[Finding]:
    try:
        lines = lines_of_keys(str(content, "utf-8-sig"))
    except ValueError:  # it is not TOML, and the message has the line
        lines = {}
    placed = [attrs.evolve(finding, line=_line_of(finding.key, lines)) for finding in found]
    return sorted(placed, key=lambda finding: finding.line or 0)


def _line_of(key: str, lines: Mapping[str, int]) -> int | None:
    """The line of a key, or of the innermost table around it that has one."""
    around = [known for known in lines if known == key or (key.startswith(known) and key[len(known)] in _INDEX)]
    return lines[max(around, key=len)] if around else None


def _of_modes(path: Path) -> Iterator[Finding]:
    if _others_may(0o022, path):
        message = f"other users may write {path}, and so open tunnels; run: chmod go-w {path}"
        yield Finding(severity="warning", key="", message=message)


def _others_may(rights: int, path: Path) -> bool:
    return os.name == "posix" and bool(path.stat().st_mode & rights)  # elsewhere modes say nothing


def _of_identity(config: RelayConfig) -> Iterator[Finding]:
    try:
        identity_of(config)
    except TunnelError as error:
        yield Finding(severity="error", key="relay.identity_key_file", message=str(error))


def _of_names(config: RelayConfig) -> Iterator[Finding]:
    try:
        NameBook(config.names_path)
    except TunnelError as error:
        yield Finding(severity="error", key="relay.names_file", message=str(error))


def _of_access(config: RelayConfig) -> Iterator[Finding]:
    for key, route in _routes(config):
        if route.access is not None:
            try:
                check_files(route.access.below(config.base_dir))
            except TunnelError as error:
                yield Finding(severity="error", key=f"{key}.access", message=str(error))


def _of_fleet(config: RelayConfig) -> Iterator[Finding]:
    if config.fleet_config is not None:
        yield from map(_of_problem, problems_of_files(config.fleet_config))


def _of_problem(problem: FleetProblem) -> Finding:
    severity, key, message = problem
    return Finding(severity=severity, key=key, message=message)


# Certificates


def _of_certificate(config: RelayConfig, now: datetime) -> Iterator[Finding]:
    certificate, private_key = config.tls_certificate_path, config.tls_private_key_path
    if certificate is None or private_key is None:
        return
    try:
        Certificate(certificate, private_key)
    except TunnelError as error:
        yield Finding(severity="error", key="relay.tls_certificate", message=str(error))
        return
    if _others_may(0o077, private_key):
        message = f"other users may read {private_key} or write it; run: chmod go= {private_key}"
        yield Finding(severity="warning", key="relay.tls_private_key", message=message)
    try:
        leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        names = _names_of(leaf)
    except (OSError, ValueError) as error:
        message = f"{certificate} can be used, but not be looked at: {error}"
        yield Finding(severity="warning", key="relay.tls_certificate", message=message)
        return
    yield from _of_dates(leaf, now)
    if config.announce_certificate:  # else a proxy in front shows another one
        yield from _of_hosts(config, names)


def _of_dates(leaf: x509.Certificate, now: datetime) -> Iterator[Finding]:
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    finding = Finding(severity="error", key="relay.tls_certificate", message="")
    if now < begin:
        yield attrs.evolve(finding, message=f"the certificate is valid from {begin:%Y-%m-%d %H:%M} UTC on, not yet")
    elif now >= end:
        yield attrs.evolve(finding, message=f"the certificate has expired, on {end:%Y-%m-%d} at {end:%H:%M} UTC")
    elif end - now < _SOON:
        message = f"the certificate expires on {end:%Y-%m-%d}, in {(end - now).days} days; renew it"
        yield attrs.evolve(finding, severity="warning", message=message)


def _of_hosts(config: RelayConfig, names: frozenset[str]) -> Iterator[Finding]:
    if config.control_tls:
        for index, public in enumerate(config.public_names):
            host = RelayAddress.parse(f"wss://{public}").host
            if not _covers(names, host):
                key = f"relay.public_names[{index}]"
                yield Finding(severity="error", key=key, message=_not_covered(names, host))
    if not config.ingress_tls:
        return
    for key, route in _routes(config):
        if route.host is None or route.url is None or route.passes_tls:
            continue
        if route.url.scheme == "http":
            message = (
                f"visitors come with TLS, so the address is https://{route.url.host}; gateways are told {route.url}"
            )
            yield Finding(severity="warning", key=f"{key}.url", message=message)
        if not _covers(names, route.host):
            yield Finding(severity="error", key=f"{key}.url", message=_not_covered(names, route.host))


def _not_covered(names: frozenset[str], host: str) -> str:
    listed = ", ".join(sorted(names)[:_MOST_NAMES]) or "no host"
    return f"the certificate is not for {host!r}; it is for {listed}{', …' if len(names) > _MOST_NAMES else ''}"


def _covers(names: frozenset[str], host: str) -> bool:
    return host in names or (not is_ip_address(host) and f"*.{host.partition('.')[2]}" in names)


def _names_of(leaf: x509.Certificate) -> frozenset[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    dns = (name.lower() for name in found.get_values_for_type(x509.DNSName))
    return frozenset([*dns, *map(str, found.get_values_for_type(x509.IPAddress))])


def _of_acme(config: RelayConfig) -> Iterator[Finding]:
    if config.acme_config is not None:
        try:
            require_extra()
        except TunnelError as error:
            yield Finding(severity="error", key="relay.acme", message=str(error))


# Addresses


async def _of_addresses(config: RelayConfig, *, running: bool) -> list[Finding]:
    keys = {
        address: key
        for key, value in (
            *((f"{key}.bind_addr", route.bind_addr) for key, route in _routes(config)),
            ("relay.http_addr", config.http_addr),
            ("relay.ingress_addr", config.ingress_addr),
            ("relay.control_addr", config.control_addr),
            ("relay.fleet.listen", None if config.fleet is None else config.fleet.all_listen),
        )
        for address in each_address(value)
    }
    found = []
    for address, key in keys.items():
        try:
            listeners = await open_listeners(address, keys)
        except OSError as error:
            if running and error.errno == errno.EADDRINUSE:
                continue
            found.append(_not_open(key, error))
        else:
            for listener in listeners:
                await listener.aclose()
    return found


def _not_open(key: str, error: OSError) -> Finding:
    if error.errno not in {errno.EACCES, errno.EPERM}:
        return Finding(severity="error", key=key, message=str(error.strerror))
    message = f"{error.strerror} for this user; the unit of 'relay init' has CAP_NET_BIND_SERVICE for it"
    return Finding(severity="warning", key=key, message=message)


def _routes(config: RelayConfig) -> Iterator[tuple[str, Route]]:
    """Each route, after the key path of its entry."""
    for index, tunnel in enumerate(config.tunnels):
        for place, route in enumerate(tunnel.routes):
            yield f"relay.tunnels[{index}]" + (f".services[{place}]" if tunnel.services else ""), route

"""What is wrong with a gateway's configuration, its settings and its key, as far as that shows without a relay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, final

import attrs
import trio

from .._model.addresses import is_loopback
from .._model.errors import MissingKeyError, Problem, TunnelError, told
from .._model.session_limits import Limits
from .._net.dialing import dial_tcp
from .._net.tls.certificate import Certificate
from .._net.tls.client import client_tls
from .._storage import files
from .._storage.toml_read import FILE_LIMIT
from .._storage.toml_statements import lines_of_keys
from .._storage.validation import NOT_A_KEY
from ..access.guard import check_files
from ..transports.built_in import TRANSPORTS
from ..transports.interface import IN_CLEAR, TLS_OF_NATIVE, TLS_OF_RATHOLE
from .config import RemoteAccessConfig
from .keystore import Keystore
from .planning import effective_config, make_plan, settle_config
from .settings import Settings, SettingsFile
from .transport import Transport

__all__ = ["Finding", "Origin", "check_gateway", "lines_in", "origins"]

_TABLE = "gateway.remote_access"
_SETTINGS_TABLE = "remote_access"
_IN_SETTINGS: Final = {"relay_addr": "server", "relay_addrs": "server"}


@final
@attrs.frozen(kw_only=True)
class Finding:
    """Something that is wrong, or that the operator should know.

    Attributes:
        severity: `error` if remote access cannot come up; else `warning`.
        file: the file that it is about.
        key: the key path in the file; empty for the file as a whole.
        line: the line of the key, from 1; None where it has none.
        message: what is wrong, and what to do.
    """

    severity: Literal["error", "warning"]
    file: str
    key: str = ""
    line: int | None = None
    message: str


async def check_gateway(config_file: Path, settings: SettingsFile, keystore: Keystore) -> list[Finding]:
    """Read all that a gateway reads when it starts. Nothing is dialled and nothing is changed.

    Args:
        config_file: the operator's configuration.
        settings: the settings file.
        keystore: where the relay key is.
    """
    problems: list[Problem] = []
    config = await _tried(lambda: RemoteAccessConfig.load(config_file), config_file, problems)
    chosen = await _tried(settings.read, settings.path, problems)
    warnings: list[Problem] = []
    if config is not None and chosen is not None:
        key = None
        try:
            key = await keystore.get(chosen.secret_ref)
        except TunnelError as error:
            problems.append(Problem(source=str(config_file), message=str(error)))
        try:
            effective, serve = settle_config(config, chosen, TRANSPORTS)
            warnings += _in_clear(effective, str(config_file))
            make_plan(effective, serve, key, instance="", dial=dial_tcp, limits=Limits(), services=None)
        except MissingKeyError as error:
            if not problems:
                warnings.append(Problem(source=str(config_file), message=str(error)))
        except TunnelError as error:
            problems += _problems_of(error, config_file)
        for key_name, read in _files_of(config):
            await _tried(read, config_file, problems, key_name)
    return [
        *_findings("error", problems, config_file, settings.path),
        *_findings("warning", warnings, config_file, settings.path),
    ]


async def _tried(read: Callable[[], Any], file: Path, problems: list[Problem], key: str = "") -> Any:
    """What `read` returns; None when it fails, with its problems among `problems`."""
    try:
        return await trio.to_thread.run_sync(read)
    except TunnelError as error:
        problems += [attrs.evolve(problem, key=problem.key or key) for problem in _problems_of(error, file)]
        return None


def _problems_of(error: TunnelError, file: Path) -> Iterable[Problem]:
    return error.problems or [Problem(source=str(file), message=str(error), kind=error.kind)]


def _files_of(config: RemoteAccessConfig) -> Iterator[tuple[str, Callable[[], object]]]:
    """What reads the files that `config` names, and the key of each."""
    if config.ca_path is not None:
        yield f"{_TABLE}.ca_file", lambda: client_tls(config.ca_path, system_trust=config.system_trust)
    if config.tls is not None:
        yield f"{_TABLE}.tls", lambda: Certificate(*config.tls_paths)
    for access in config.access_rules.values():
        if access is not None:
            yield f"{_TABLE}.access", lambda access=access: check_files(access)  # type: ignore[misc]


def _in_clear(config: RemoteAccessConfig, file: str) -> Iterator[Problem]:
    """The warning that the log has when the tunnel is up."""
    transport = config.effective_transport
    native = transport is Transport.WEBSOCKET
    key = f"{_TABLE}.{'relay_addrs' if config.relay_addrs else 'relay_addr'}"
    instead = TLS_OF_NATIVE if native else TLS_OF_RATHOLE
    for address in config.effective_relay_addrs:
        if not is_loopback(address.host) and (transport is Transport.TCP or (native and not address.secure)):
            yield Problem(source=file, key=key, message=IN_CLEAR % (address, instead))


def _findings(
    severity: Literal["error", "warning"], problems: Iterable[Problem], config_file: Path, settings_file: Path
) -> Iterator[Finding]:
    lines = {str(path): lines_in(path) for path in (config_file, settings_file)}
    for problem in problems:
        source, key = problem.source or str(config_file), problem.key
        if problem.source is None and key:  # of the settings and the configuration together
            here = f"{_SETTINGS_TABLE}.{key}" in lines[str(settings_file)]
            source, key = (str(settings_file), f"{_SETTINGS_TABLE}.{key}") if here else (source, f"{_TABLE}.{key}")
        yield Finding(
            severity=severity,
            file=source,
            key=key,
            line=_line(lines.get(source, {}), key),
            message=told(problem),
        )


def _line(lines: Mapping[str, int], key: str) -> int | None:
    """The line of a key, or of the table that lacks it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)


def lines_in(path: Path) -> Mapping[str, int]:
    """The lines of the keys of a TOML file; none when it cannot be read, which its reader reports."""
    try:
        content = files.read(path, limit=FILE_LIMIT)
        return {} if content is None else lines_of_keys(bytes(content).decode("utf-8-sig"))
    except (TunnelError, ValueError, RecursionError):
        return {}


@final
@attrs.frozen(kw_only=True)
class Origin:
    """A value of the effective configuration, and where it is from.

    Attributes:
        value: the value.
        file: the file; None for a default.
        line: the line in it.
    """

    value: object
    file: Path | None = None
    line: int | None = None


def origins(
    config_file: Path, config: RemoteAccessConfig, settings_file: Path, settings: Settings
) -> dict[str, Origin]:
    """Each key of the effective configuration.

    Raises:
        TunnelError: settings and configuration contradict each other.
    """
    effective = effective_config(config, settings)
    ours, theirs = lines_in(config_file), lines_in(settings_file)
    found: dict[str, Origin] = {}
    for field in attrs.fields(RemoteAccessConfig):
        if NOT_A_KEY in field.metadata:
            continue
        value, line = getattr(effective, field.name), ours.get(f"{_TABLE}.{field.name}")
        in_settings = theirs.get(f"{_SETTINGS_TABLE}.{_IN_SETTINGS.get(field.name, field.name)}")
        if value != getattr(config, field.name) and in_settings is not None:
            found[field.name] = Origin(value=value, file=settings_file, line=in_settings)
        else:
            found[field.name] = Origin(value=value, file=None if line is None else config_file, line=line)
    if found["transport"].value is None:
        found["transport"] = Origin(value=effective.effective_transport)
    first = found["relay_addrs" if effective.relay_addrs else "relay_addr"]
    found["relay_addr"] = attrs.evolve(first, value=effective.effective_relay_addr)
    return found

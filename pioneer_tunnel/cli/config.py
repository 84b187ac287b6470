"""The commands `config check` and `config show`: about a gateway's configuration, or about the client file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs
import click
import trio

from .._model.addresses import HttpsAddress, UnixAddress
from .._model.errors import InvalidSettingsError, told
from .._model.exception_groups import lone_error_bare
from .._model.text import hide_secrets, shown
from ..access.rules import Access
from ..gateway.check import Finding, check_gateway, lines_in, origins
from ..gateway.settings import SettingsFile
from ..gateway.tls_config import TlsConfig
from ..transports.process.config import ProcessConfig
from .arguments import Command
from .client_file import CLIENT_TABLE, key_of, read_client_file, usual_client_file, variable_of
from .expose import expose
from .gateway_options import GatewayFiles, gateway_options

__all__ = ["config_commands"]

_PRINTABLE: Final = (str, int, float, list, tuple)
"""A default is one of these, or none. How click says that depends on its version."""

_COLOURS: Final = {"error": "red", "warning": "yellow"}
_DEFAULT: Final = "default"
_NOT_SECRET: Final = {
    "key_mode",
    "key_file",
    "relay_identity",
    "proxy_credentials_file",
    "tls_private_key",
    "bearer_tokens",
}
"""Their names sound like secrets. They hold names of files, public keys and choices."""


@click.group("config", short_help="Check a configuration, and show its values.")
def config_commands() -> None:
    """Check a configuration, or show what is in force and where each value is from.

    With --config it is a gateway's, else that of expose: the client file in your configuration folder, and environment
    variables.
    """


@config_commands.command("check", cls=Command)
@gateway_options(required=False)
@click.option("--json", "as_json", is_flag=True, help="An array of objects: severity, file, key, line, message.")
def check(*, files: GatewayFiles | None, as_json: bool) -> None:
    """Name each problem of a configuration, with file, line and key. Nothing is dialled.

    The exit status is 1 if there is an error, else 0.

    \b
    Examples:
      pioneer-tunnel config check --config gateway.toml
      pioneer-tunnel config check
    """
    if files is None:
        found, about = _check_client()
    else:
        settings = SettingsFile(files.settings)
        with lone_error_bare():
            found = trio.run(check_gateway, files.config, settings, files.keystore)
        about = str(files.config)
    if as_json:
        click.echo(json.dumps([attrs.asdict(finding) for finding in found]))
    else:
        for finding in found:
            place = finding.file if finding.line is None else f"{finding.file}:{finding.line}"
            severity = click.style(finding.severity, fg=_COLOURS[finding.severity])
            click.echo(f"{place}: {severity}: {finding.key + ': ' if finding.key else ''}{finding.message}")
        if not found:
            click.echo(f"{about}: nothing is wrong")
    sys.exit(any(finding.severity == "error" for finding in found))


def _check_client() -> tuple[list[Finding], str]:
    path = usual_client_file()
    if path is None:
        return [], "there is no client file"
    try:
        read_client_file(path, expose.params)
    except InvalidSettingsError as error:
        lines = lines_in(path)
        return [
            Finding(
                severity="error",
                file=str(path),
                key=problem.key,
                line=lines.get(problem.key),
                message=told(problem),
            )
            for problem in error.problems
        ], str(path)
    return [], str(path)


@config_commands.command("show", cls=Command)
@gateway_options(required=False)
@click.option("--json", "as_json", is_flag=True, help="An object: for each key its value and source.")
def show(*, files: GatewayFiles | None, as_json: bool) -> None:
    """Show the values that are in force, and where each one is from. Secrets are never shown.

    \b
    Examples:
      pioneer-tunnel config show --config gateway.toml
      pioneer-tunnel config show --json
    """
    rows = _client_values() if files is None else _gateway_values(files)
    if as_json:
        click.echo(json.dumps({name: {"value": value, "source": source} for name, (value, source) in rows.items()}))
        return
    for name, (value, source) in rows.items():
        click.echo(f"{name} = {'-' if value is None else value}  ({source})")


def _gateway_values(files: GatewayFiles) -> Mapping[str, tuple[str | None, str]]:
    settings = SettingsFile(files.settings).read()
    found = origins(files.config, files.load(), files.settings, settings)
    rows = {
        name: (_printed(name, origin.value), _DEFAULT if origin.file is None else f"{origin.file}:{origin.line}")
        for name, origin in found.items()
    }
    line = lines_in(files.settings).get("remote_access.enabled")
    rows["enabled"] = (_printed("", settings.enabled), _DEFAULT if line is None else f"{files.settings}:{line}")
    return rows


def _client_values() -> Mapping[str, tuple[str | None, str]]:
    path = usual_client_file()
    values = {} if path is None else read_client_file(path, expose.params)
    lines = {} if path is None else lines_in(path)
    context = click.Context(expose, resilient_parsing=True)
    rows: dict[str, tuple[str | None, str]] = {}
    for parameter in expose.params:
        name = key_of(parameter)
        given = parameter.value_from_envvar(context)
        if given is not None:
            rows[name] = _printed(name, given), f"environment {variable_of(parameter)}"
        elif name in values:
            rows[name] = _printed(name, values[name]), f"{path}:{lines.get(f'{CLIENT_TABLE}.{name}')}"
        elif name not in {"config", "help"}:
            default = parameter.get_default(context)
            rows[name] = _printed(name, default if isinstance(default, _PRINTABLE) else None), _DEFAULT
    return rows


def _printed(name: str, value: object) -> str | None:
    """A value as text; None when there is none."""
    match value:
        case None | () | []:
            return None
        case list() | tuple():
            return ", ".join(str(_printed(name, one)) for one in value)
        case Mapping():
            return ", ".join(f"{key}={_printed(name, one)}" for key, one in value.items()) or None
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case Access() | TlsConfig() | ProcessConfig():
            return "a table"
    text = hide_secrets(repr(str(value)))
    return text if name in _NOT_SECRET or isinstance(value, Path | UnixAddress | HttpsAddress) else shown(name, value)

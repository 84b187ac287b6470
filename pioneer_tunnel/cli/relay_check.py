"""`relay check`: what is wrong with a relay's file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import attrs
import click
import trio

from .._model.errors import StorageError
from ..relay.administration.check import Finding, check as check_relay
from ..relay.administration.running import ask_running
from .arguments import Command
from .relay_options import config_option, errors_name

__all__ = ["check", "show_findings"]

_COLOURS: Final = {"error": "red", "warning": "yellow"}


@click.command(cls=Command, short_help="Check a relay's file, certificates and addresses.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="An array of objects: severity, key, line, message.")
def check(config: Path, as_json: bool) -> None:
    """Check a relay's file as the relay reads it, and what it names.

    That is: certificate, its dates and hosts; the extra acme, if it is needed; identity key; files of access rules;
    file modes; whether the addresses are free. The exit status is 1 if there is an error, else 0.

    \b
    Examples:
      pioneer-tunnel relay check
      pioneer-tunnel relay check --config relay.toml --json
    """
    with errors_name({}):
        found = trio.run(_check, config)
    if as_json:
        click.echo(json.dumps([attrs.asdict(finding) for finding in found]))
    else:
        show_findings(config, found)
    sys.exit(any(finding.severity == "error" for finding in found))


async def _check(config: Path) -> list[Finding]:
    try:
        running = await ask_running(config)
    except StorageError:  # of another user; its addresses are taken then, and that is said
        running = None
    return await check_relay(config, running=running is not None)


def show_findings(path: Path, found: list[Finding]) -> None:
    """Print what is wrong, one line for each."""
    for finding in found:
        place = f"{path}:{finding.line}" if finding.line is not None else str(path)
        severity = click.style(finding.severity, fg=_COLOURS[finding.severity])
        click.echo(f"{place}: {severity}: {finding.key + ': ' if finding.key else ''}{finding.message}")
    if not found:
        click.echo(f"{path}: nothing is wrong")

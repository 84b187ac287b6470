"""The commands `demo` and `version`."""

from __future__ import annotations

import json
import platform
import signal
import ssl
import sys
from importlib.metadata import PackageNotFoundError, version as version_of
from typing import Final

import click

from .._compiled import COMPILED
from .._interrupts import INTERRUPTED
from .._version import __version__
from .arguments import Command

__all__ = ["demo", "version"]

_PACKAGES: Final = ("trio", "trio-websocket", "websockets", "h11", "wsproto", "attrs", "cryptography", "click", "rich")


@click.command(cls=Command, short_help="Run a relay, a gateway and visitors here.")
def demo() -> None:
    """Run a relay, a gateway, a tunnel and visitors on this machine, and say what happens.

    It takes some seconds. It listens on this machine alone, and leaves nothing behind.

    \b
    Example:
      pioneer-tunnel demo
    """
    from .demonstration import demonstrate  # noqa: PLC0415  # only who wants it pays for it

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it removes what it has made
    try:
        demonstrate()
    except* KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:
    """Print the versions of what matters in a bug report.

    \b
    Example:
      pioneer-tunnel version
    """
    found = {
        "pioneer-tunnel": __version__,
        "build": "compiled" if COMPILED else "pure Python",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "OpenSSL": ssl.OPENSSL_VERSION,
        "platform": platform.platform(),
        **{package: _installed(package) for package in _PACKAGES},
    }
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<16}{value or 'not installed'}")


def _installed(package: str) -> str | None:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None

"""The command `run`: a gateway's remote access, in a process of its own."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from .._model.errors import TunnelError
from .._model.status import State, Status
from ..gateway.remote_access import RemoteAccess
from .arguments import Command, log_format_option
from .exit_codes import EXIT_CODES
from .gateway_options import GatewayFiles, gateway_options
from .gateway_process import GatewayProcess
from .qr import QrCode
from .signals import run_until_stopped
from .standard_error import write_json_lines
from .status_lines import StatusLines
from .status_view import LiveView, PlainView, StatusView

__all__ = ["run"]


@click.command(cls=Command)
@gateway_options()
@click.option("--stay", is_flag=True, help="Go on after a failure that is final, until the settings change.")
@click.option("--qr/--no-qr", default=None, help="The public address as a QR code as well, on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Status lines (with 'state') and log lines (with 'log') as JSON.")
@log_format_option
@click.pass_obj
def run(
    log_handler: logging.StreamHandler[Any],
    /,
    *,
    files: GatewayFiles,
    stay: bool,
    qr: bool | None,
    as_json: bool,
    log_format: str,
) -> None:
    """Run a gateway's remote access, until interrupted. Visitors are forwarded to local_addr.

    \b
    Examples:
      pioneer-tunnel key set --config gateway.toml
      pioneer-tunnel enable --config gateway.toml
      pioneer-tunnel run --config gateway.toml

    The commands status, enable, disable and key speak to it while it runs. SIGHUP rereads the configuration, and
    reopens the access log. SIGUSR1 checks the link. SIGINT and SIGTERM let visitors finish; a second one ends at once.

    Status lines go to standard error; on a terminal a bar below them shows what goes on. systemd hears of it
    (Type=notify-reload, WatchdogSec). The exit status after a failure that is final names the error kind.
    """
    if as_json or log_format == "json":
        write_json_lines(log_handler)
    try:
        remote_access = files.remote_access()
        process = GatewayProcess(
            remote_access,
            files.load,
            _view(log_handler, remote_access, qr=qr, as_json=as_json),
            stay=stay,
        )
        run_until_stopped(process.run, process.stop)
    except TunnelError as error:
        if not as_json:
            raise
        StatusLines(as_json=True, of_options=False).show_failure(error)
        sys.exit(EXIT_CODES[error.kind])
    if process.failure is not None:
        sys.exit(_exit_code(process.failure))


def _exit_code(failure: Status) -> int:
    assert failure.state is State.FAILED
    return 1 if failure.error_kind is None else EXIT_CODES[failure.error_kind]


def _view(
    log_handler: logging.StreamHandler[Any], remote_access: RemoteAccess, *, qr: bool | None, as_json: bool
) -> StatusView:
    if as_json or not sys.stderr.isatty():
        return PlainView(as_json=as_json)
    local = str(remote_access.config.local)
    return LiveView(local, remote_access.stats, qr=QrCode(qr), log_handler=log_handler)

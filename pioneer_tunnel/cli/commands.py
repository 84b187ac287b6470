"""The group of all commands, and `relay`, `relay new-key` and `relay new-identity`."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Final, get_args

import click

from .._model.errors import TunnelError
from .._model.keys import SigningIdentity, new_relay_key
from .._net.descriptor_limit import raise_descriptor_limit
from .._version import __version__
from ..relay import Relay
from ..relay.handover import Predecessor
from ..relay.inherited import from_systemd
from ..relay.reload import ConfigFile
from ..relay.spawning import WORKER_VARIABLE
from ..websocket import EngineName
from .about import demo, version
from .arguments import Choice, Command, Commands, ExistingFile, log_format_option
from .config import config_commands
from .diagnose import diagnose
from .exit_codes import Failed
from .expose import expose
from .relay_commands import RELAY_COMMANDS
from .relay_options import USUAL_CONFIG, find_config
from .relay_process import RelayProcess
from .run import run
from .settings import disable, enable, key_commands, status
from .signals import run_until_stopped
from .standard_error import write_json_lines

__all__ = ["pioneer_tunnel"]

_FILE: Final = ExistingFile()
_websocket_engine: Final = click.option(
    "--websocket-engine",
    type=Choice(get_args(EngineName)),
    help="What speaks WebSocket; by default the fastest that is installed.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pioneer-tunnel")
@click.option("-v", "--verbose", is_flag=True, help="Log more. Never logs a key.")
@click.pass_context
def pioneer_tunnel(context: click.Context, verbose: bool) -> None:
    """Reach a gateway behind NAT through a relay."""
    if "NO_COLOR" in os.environ:  # https://no-color.org
        context.color = False
    raise_descriptor_limit()
    level = logging.DEBUG if verbose else logging.INFO
    context.obj = handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(message)s", handlers=[handler])


for _command in (
    expose,
    run,
    status,
    enable,
    disable,
    key_commands,
    config_commands,
    diagnose,
    demo,
    version,
):
    pioneer_tunnel.add_command(_command)


@pioneer_tunnel.group(invoke_without_command=True)
@click.option("--config", type=_FILE, metavar="FILE", help=f"The relay's TOML file; by default {USUAL_CONFIG}.")
@_websocket_engine
@click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Serve with N processes, for N cores.")
@log_format_option
@click.pass_context
def relay(
    context: click.Context,
    config: Path | None,
    websocket_engine: EngineName | None,
    workers: int | None,
    log_format: str,
) -> None:
    """Run a relay until it is interrupted.

    Its tunnels follow the file: it is read again when it changes, and on SIGHUP, which also reopens the access log.
    SIGUSR2 starts a successor, which takes over without refusing a connection. SIGINT and SIGTERM let visitors finish;
    a second one ends at once. With --workers, SIGUSR2 replaces the workers one by one.
    """
    if context.invoked_subcommand is not None:
        return
    config = find_config(context, config)
    if log_format == "json":
        write_json_lines(context.obj)
    if workers is not None:
        _run_with_workers(context, config, websocket_engine, workers)
        return
    try:
        file = ConfigFile(config)
        predecessor = Predecessor.from_environment()
        inherited = from_systemd() if predecessor is None else predecessor.inherited
        server = Relay(file.load(), engine=websocket_engine, inherited=inherited)
        process = RelayProcess(server, file, predecessor)
        run_until_stopped(process.run, process.stop)
    except TunnelError as error:
        raise Failed(str(error), error.kind) from error
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from error


def _run_with_workers(context: click.Context, config: Path, engine: EngineName | None, workers: int) -> None:
    from ..relay.workers.process import NoWorker  # noqa: PLC0415  # a relay without workers needs none of it
    from .workers_process import run_parent, run_worker  # noqa: PLC0415

    try:
        if WORKER_VARIABLE in os.environ:
            run_worker(config, engine, context.obj)
        else:
            run_parent(config, workers)
    except NoWorker as error:
        raise click.ClickException(str(error)) if error.kind is None else Failed(str(error), error.kind) from error
    except TunnelError as error:
        raise Failed(str(error), error.kind) from error
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from error


for _command in RELAY_COMMANDS:
    relay.add_command(_command)


@relay.command("new-key", cls=Command, short_help="Print a fresh relay key, and its public half.")
def new_key() -> None:
    """Print a fresh key on the first line, and on the second what the relay's registry needs to know of it.

    The first line is the secret: it goes to the gateway, and nowhere else.
    """
    key = new_relay_key()
    click.echo(key.reveal())
    click.echo(key.identity().public_key)


@relay.command("new-identity", cls=Command, short_help="Print a fresh identity for a relay.")
def new_identity() -> None:
    """Print a fresh identity for a relay: the private seed on the first line, what gateways pin on the second.

    The first line is the secret: it goes to the file that identity_key_file names.
    """
    seed = secrets.token_bytes(32)
    click.echo(seed.hex())
    click.echo(SigningIdentity.from_seed(seed).public_key)

"""What the commands about a relay's file share: its option, and errors that name options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from .._model.errors import InvalidSettingsError, TunnelError
from .._storage import files
from .arguments import ExistingFile
from .exit_codes import Failed

__all__ = ["USUAL_CONFIG", "config_option", "errors_name", "find_config"]

USUAL_CONFIG: Final = Path("/etc/pioneer-tunnel/relay.toml")
"""Never a file of the current folder: that may be another user's."""

_FIELD: Final = re.compile(r"\w+")


def find_config(context: click.Context, given: Path | None) -> Path:
    """The relay's file: the one that is given, else the usual one.

    Raises:
        click.UsageError: there is none.
    """
    if given is not None:
        return given
    with errors_name({}):
        if files.exists(USUAL_CONFIG):
            return USUAL_CONFIG
    raise click.UsageError("name the relay's file with --config FILE", context)


def _of_command(context: click.Context, _option: click.Parameter, value: Path | None) -> Path:
    if value is None and context.parent is not None:
        value = context.parent.params.get("config")
    return find_config(context, value)


config_option: Final = click.option(
    "--config",
    type=ExistingFile(),
    callback=_of_command,
    metavar="FILE",
    help=f"The relay's TOML file; by default {USUAL_CONFIG}.",
)


@contextmanager
def errors_name(options: Mapping[str, str]) -> Iterator[None]:
    """Turn our errors into those of the command line.

    Args:
        options: the option for each key of what the user has described. A problem without a file is about these.
    """
    try:
        yield
    except InvalidSettingsError as error:
        ours = [problem for problem in error.problems if problem.source is None]
        if not ours or len(ours) < len(error.problems):
            raise Failed(str(error), error.kind) from error
        lines = []
        for problem in ours:
            field = _FIELD.match(problem.key)
            option = options.get(field[0], problem.key) if field is not None else problem.key
            lines.append(f"{option}: {problem.message}" if option else problem.message)
        raise click.UsageError("\n".join(lines)) from error
    except TunnelError as error:
        raise Failed(str(error), error.kind) from error

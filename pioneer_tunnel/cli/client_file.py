"""The client file: options of `expose` and `diagnose` that are the same each time, in a file of the user's.

It is `pioneer-tunnel.toml` in the user's configuration folder, or what `--config` names. It is never looked for in the
current folder: a cloned repository must not choose the relay. An option on the command line comes
first, then its environment variable, then the file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import attrs
import click
from click.core import ParameterSource

from .._model.errors import Problem
from .._model.keys import KEY_PREFIX
from .._model.text import hide_secrets, redact_reason, shown
from .._storage import files
from .._storage.toml_read import read_toml, subtable
from .._storage.validation import nearest, refusal
from .arguments import Command, ExistingFile
from .exit_codes import failures_explained

__all__ = [
    "CLIENT_TABLE",
    "ClientCommand",
    "client_file_option",
    "key_of",
    "load_client_file",
    "read_client_file",
    "usual_client_file",
    "variable_of",
]

CLIENT_TABLE: Final = "expose"
_NAME: Final = "pioneer-tunnel.toml"
_PREFIX: Final = "PIONEER_TUNNEL_"
_WHERE_KEYS_GO: Final = (
    "the relay key does not belong in this file; write it to a file of its own that only you can read,"
    " and name that one with key_file"
)
_KEYS: Final = {"key", "relay_key", "token", "secret"}
_FILE: Final = "pioneer_tunnel: client file"


def _config_folder() -> Path | None:
    """The folder for the user's configuration files; None for a user without a home."""
    home = os.path.expanduser("~")  # noqa: PTH111  # `Path.home` raises for such a user
    if not os.path.isabs(home):  # noqa: PTH117
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or f"{home}/AppData/Roaming")
    if sys.platform == "darwin":
        return Path(home, "Library", "Application Support")
    named = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(named) if os.path.isabs(named) else Path(home, ".config")  # noqa: PTH117  # a relative one counts for none


def usual_client_file() -> Path | None:
    """The client file that the environment names, or that is in the user's configuration folder; None if there is none.

    One that the environment names and that does not exist is an error for its reader.
    """
    named = os.environ.get(f"{_PREFIX}CONFIG")
    if named:
        return Path(named)
    folder = _config_folder()
    path = None if folder is None else folder / _NAME
    # `Path.exists` raises where this user may not look, as with the HOME of another one after `sudo -u`.
    return path if path is not None and os.path.exists(path) else None  # noqa: PTH110


def variable_of(parameter: click.Parameter) -> str:
    """The environment variable of an option or argument: `PIONEER_TUNNEL_RELAY` for `--relay`."""
    return _PREFIX + key_of(parameter).upper()


def key_of(parameter: click.Parameter) -> str:
    """The name of a parameter in the file: `key_file` for `--key-file`."""
    name = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else str(parameter.name)
    return name.lstrip("-").replace("-", "_")


def read_client_file(path: Path, parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    """The values of a client file, by key. Paths are relative to the file.

    Args:
        path: the file.
        parameters: what it may hold values for.

    Raises:
        StorageError: it cannot be read, or others can write it.
        InvalidSettingsError: it is not TOML, has unknown keys, or values that are not allowed; it names all of them.
    """
    files.refuse_writable(path)
    document = read_toml(path)
    table = subtable(document, CLIENT_TABLE, source=str(path)) or {}
    known = {key_of(parameter): parameter for parameter in parameters if parameter.name != "config"}
    values: dict[str, Any] = {}
    problems = [
        Problem(key=hide_secrets(name), message="unknown table", nearest=CLIENT_TABLE)
        for name in document
        if name != CLIENT_TABLE
    ]
    for name, value in table.items():
        key = f"{CLIENT_TABLE}.{hide_secrets(name)}"
        if name in _KEYS or KEY_PREFIX in str(value):
            problems.append(Problem(key=key, message=_WHERE_KEYS_GO))
        elif name not in known:
            problems.append(Problem(key=key, message="unknown key", nearest=nearest(name, known)))
        else:
            try:
                values[name] = _read(known[name], value, path.absolute().parent)
            except ValueError as error:
                text = redact_reason(str(error), value)
                problems.append(Problem(key=key, value=shown(name, value), message=text))
    if problems:
        raise refusal(attrs.evolve(problem, source=str(path)) for problem in problems)
    return values


def _read(parameter: click.Parameter, value: object, folder: Path) -> object:
    """The value for click.

    Raises:
        ValueError: it is not allowed.
    """
    many = parameter.multiple or parameter.nargs == -1
    values = value if isinstance(value, list) and many else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise ValueError("allowed is an array of texts" if many else "allowed is one value")
    if getattr(parameter, "is_flag", False) != isinstance(value, bool):
        raise ValueError("allowed is true or false" if not isinstance(value, bool) else "allowed is no true or false")
    if isinstance(parameter.type, click.Path):
        values = [str(folder / os.path.expanduser(str(one))) for one in values]  # noqa: PTH111
    read = values if many else values[0]
    try:
        parameter.process_value(click.Context(click.Command(None)), read)
    except click.ClickException as error:
        raise ValueError(error.message) from None
    return read


def load_client_file(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    """The callback of an option that names the client file: its values become defaults of the command's options."""
    path = usual_client_file() if path is None else path
    if path is None:
        return
    command = context.command
    assert isinstance(command, ClientCommand)
    with failures_explained():
        values = read_client_file(path, command.keys or command.params)
    names = {key_of(parameter): parameter.name for parameter in command.params}
    context.default_map = {str(names[key]): value for key, value in values.items() if key in names}
    context.meta[_FILE] = path


client_file_option: Final = click.option(
    "--config",
    type=ExistingFile(),
    is_eager=True,
    expose_value=False,
    callback=load_client_file,
    help=f"A file with options; by default {_NAME} in your configuration folder.",
)


@final
class ClientCommand(Command):
    """A command whose options may come from the environment and the client file. Errors say where a value is from.

    Args:
        keys: the options that the file may hold, where they are not those of this command.
    """

    def __init__(self, *arguments: Any, keys: Sequence[click.Parameter] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.keys: Final = keys
        for parameter in self.params:
            if parameter.name != "config":
                parameter.envvar = variable_of(parameter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for parameter in self.params:
            if KEY_PREFIX in os.environ.get(variable_of(parameter), ""):
                raise click.UsageError(
                    f"the environment variable {variable_of(parameter)} holds a relay key, and other programs can see"
                    " it there. Write the key to a file that only you can read, and name that file with --key-file"
                )
        try:
            return super().parse_args(ctx, args)
        except click.ClickException as error:
            about: click.Parameter | None = getattr(error, "param", None)
            source = None if about is None else self.source_of(ctx, about)
            if source is not None:
                error.message += f" (it is from {source})"  # type: ignore[misc]  # there is no other way
            raise

    def source_of(self, ctx: click.Context, parameter: click.Parameter) -> str | None:
        """Where the value of a parameter is from; None for the command line and for defaults."""
        match ctx.get_parameter_source(str(parameter.name)):
            case ParameterSource.ENVIRONMENT:
                return f"the environment variable {variable_of(parameter)}"
            case ParameterSource.DEFAULT_MAP:
                return f"{key_of(parameter)} in {ctx.meta[_FILE]}"
        return None

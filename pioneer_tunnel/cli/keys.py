"""Where a command gets a relay key from: a file, standard input, or a question. Never from an argument.

No error quotes what was read.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import click

from .._interrupts import INTERRUPTED
from .._model.errors import StorageError
from .._model.keys import RelayKey
from .._storage import files
from .arguments import STDIN, ExistingFile

__all__ = ["KEY_FILE", "key_source", "read_key"]

KEY_FILE: Final = ExistingFile(or_stdin=True)

_LIMIT: Final = 64 * 1024
_NO_KEY: Final = (
    "there is no relay key: name a file that holds it with --key-file FILE, or write --key-file - and send it to"
    " standard input"
)

_log: Final = logging.getLogger("pioneer_tunnel.cli")


def key_source(path: Path | None, *, native: bool) -> Callable[[], RelayKey]:
    """What reads the key. It reads a file each time, and standard input or the terminal once.

    Args:
        path: the file; `STDIN` for standard input; None to ask on the terminal.
        native: whether the key is for transport `websocket`.
    """
    if path is None or path == STDIN:
        return functools.cache(lambda: _read_once(path, native=native))
    return lambda: read_key(path, native=native)


def _read_once(path: Path | None, *, native: bool) -> RelayKey:
    return _usable(_ask() if path is None else _from_stdin(), "the key", native=native)


def read_key(path: Path, *, native: bool) -> RelayKey:
    """The key on the first line of a file. The second line may be the public key, as `relay new-key` prints it."""
    where = f"the key file {str(path)!r}"
    try:
        content = files.read(path, limit=_LIMIT)
        if content is None:
            raise click.ClickException(f"{where} is gone")
        text = str(content, "utf-8")
    except StorageError as error:
        raise click.ClickException(f"{where}: {error}") from None
    except UnicodeDecodeError:
        raise click.ClickException(f"{where} is not a text file") from None
    key = _usable(text, where, native=native)
    if path.stat().st_mode & 0o077:
        _log.warning("the key file %s can be read by others; 'chmod 600 %s' mends that", path, path)
    return key


def _usable(text: str, where: str, *, native: bool) -> RelayKey:
    first, *others = text.strip().splitlines() or [""]
    if any(not line.startswith("ed25519:") for line in others if line.strip()):
        raise click.ClickException(f"{where} holds more than a key on its first line")
    try:
        key = RelayKey(first)
    except ValueError as error:
        problem: str | None = str(error)
    else:
        problem = key.why_unusable(native=native)
        if problem is None:
            return key
    raise click.ClickException(f"{where}: {problem}")


def _from_stdin() -> str:
    try:
        content = sys.stdin.buffer.read(_LIMIT + 1)
        if len(content) > _LIMIT:
            raise click.ClickException(f"standard input is longer than {_LIMIT} bytes")
        return content.decode()
    except UnicodeDecodeError:
        raise click.ClickException("standard input is not text") from None
    except OSError as error:
        raise click.ClickException(f"standard input cannot be read: {error.strerror}") from None


def _ask() -> str:
    if not sys.stdin.isatty():
        raise click.UsageError(_NO_KEY)
    # Our usual handler ends the process at once, and would leave the terminal without an echo.
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        answer: str = click.prompt("relay key (it is not shown)", hide_input=True, err=True)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before)
    return answer


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt

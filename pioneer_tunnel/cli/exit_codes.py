"""The exit status of a command that has failed: one for each error kind of the gateway contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, final

import click

from .._model.errors import TunnelError
from .._model.status import ErrorKind
from .._wire.json_rpc import INVALID_PARAMS, RpcError

__all__ = ["EXIT_CODES", "Failed", "failures_explained"]

EXIT_CODES: Final[Mapping[ErrorKind, int]] = MappingProxyType(
    {
        ErrorKind.UNKNOWN: 30,
        ErrorKind.INVALID_SETTINGS: 31,
        ErrorKind.MISSING_KEY: 32,
        ErrorKind.MISSING_BINARY: 33,
        ErrorKind.LOCAL_GATEWAY_UNAVAILABLE: 34,
        ErrorKind.RELAY_RESOLVE_FAILED: 35,
        ErrorKind.RELAY_CONNECT_FAILED: 36,
        ErrorKind.TUNNEL_AUTH_FAILED: 37,
        ErrorKind.PROCESS_EXITED: 38,
        ErrorKind.UNSUPPORTED_TRANSPORT: 39,
        ErrorKind.RESTART_LIMIT_REACHED: 40,
        ErrorKind.IO: 41,
    }
)
"""Numbers that neither shells, nor `diagnose`, nor <sysexits.h> use. docs/command-line.md has them."""


@final
class Failed(click.ClickException):
    """A failure with the exit status of its kind."""

    def __init__(self, message: str, kind: ErrorKind) -> None:
        super().__init__(message)
        self.exit_code = EXIT_CODES[kind]  # type: ignore[misc]  # click reads it from the instance


@contextmanager
def failures_explained() -> Iterator[None]:
    """Turn our errors into a line on standard error and an exit status."""
    try:
        yield
    except TunnelError as error:
        raise Failed(str(error), error.kind) from error
    except RpcError as error:  # what the running gateway says
        kind = ErrorKind.INVALID_SETTINGS if error.code == INVALID_PARAMS else ErrorKind.UNKNOWN
        raise Failed(error.message, kind) from error

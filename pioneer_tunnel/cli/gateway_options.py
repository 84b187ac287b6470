"""What all commands about a gateway take: its configuration, and where its settings and its key are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, final

import attrs
import click

from ..gateway.config import RemoteAccessConfig
from ..gateway.keystore import EnvironmentKeystore, FileKeystore, KeyringKeystore, Keystore
from ..gateway.remote_access import RemoteAccess
from ..gateway.settings import SettingsFile
from .arguments import ExistingFile
from .exit_codes import failures_explained

__all__ = ["GatewayFiles", "gateway_options"]

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
_ENVIRONMENT: Final = "env:"
_KEYRING: Final = "keyring"


@final
@attrs.frozen
class GatewayFiles:
    """Where a gateway keeps what belongs to it.

    Attributes:
        config: the file of the operator's configuration.
        settings: the settings file.
        keystore: the keystore.
    """

    config: Path
    settings: Path
    keystore: Keystore

    def load(self) -> RemoteAccessConfig:
        """Read the configuration.

        Raises:
            TunnelError: see `RemoteAccessConfig.load`.
        """
        return RemoteAccessConfig.load(self.config)

    def remote_access(self) -> RemoteAccess:
        """Remote access that does not run, with the configuration as it is now.

        Raises:
            TunnelError: see `RemoteAccessConfig.load`.
        """
        return RemoteAccess(self.load(), settings=SettingsFile(self.settings), keystore=self.keystore)


def _keystore(text: str | None, beside: Path) -> Keystore:
    if text is None:
        return FileKeystore(beside / "keystore")
    if text == _KEYRING:
        return KeyringKeystore()
    if text.startswith(_ENVIRONMENT):
        return EnvironmentKeystore(variable=text.removeprefix(_ENVIRONMENT))
    return FileKeystore(text)


def gateway_options(*, required: bool = True) -> Callable[[_CommandT], _CommandT]:
    """Adds the options; the command gets a `GatewayFiles` as `files`. Our errors become an exit status.

    Args:
        required: whether there must be a configuration; else `files` may be None.
    """

    def add(command: _CommandT) -> _CommandT:
        @functools.wraps(command)
        def wrapped(
            *arguments: Any, config: Path | None, settings: Path | None, keystore: str | None, **options: Any
        ) -> None:
            files = None
            if config is not None:
                beside = config.absolute().parent
                files = GatewayFiles(config, settings or beside / "gateway-settings.toml", _keystore(keystore, beside))
            with failures_explained():
                command(*arguments, files=files, **options)

        for option in _options(required=required):
            wrapped = option(wrapped)
        return wrapped  # type: ignore[return-value]  # click calls it

    return add


def _options(*, required: bool) -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option(
            "--keystore",
            envvar="PIONEER_TUNNEL_KEYSTORE",
            metavar="FOLDER",
            help="Where the key is: a folder, keyring, or env:VARIABLE; by default keystore beside --config.",
        ),
        click.option(
            "--settings",
            type=click.Path(path_type=Path, dir_okay=False),
            envvar="PIONEER_TUNNEL_SETTINGS",
            metavar="FILE",
            help="What enable and disable change; by default gateway-settings.toml beside --config.",
        ),
        click.option(
            "--config",
            type=ExistingFile(),
            required=required,
            envvar="PIONEER_TUNNEL_GATEWAY_CONFIG",
            metavar="FILE",
            help="The gateway's TOML file, with [gateway.remote_access].",
        ),
    )

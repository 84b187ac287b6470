"""The options of `expose` for automatic certificates."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from .._model.errors import TunnelError
from ..certificates.config import AcmeConfig
from .arguments import ExistingFile

__all__ = ["with_acme"]

_OPTIONS: Final = (
    click.option(
        "--acme",
        is_flag=True,
        help="End visitors' TLS with a certificate that is ordered from Let's Encrypt, whose terms you accept by this.",
    ),
    click.option("--acme-directory", metavar="URL", help="Another authority; letsencrypt-staging to try it."),
    click.option("--acme-email", metavar="ADDRESS", help="Where the authority may write to."),
    click.option(
        "--acme-folder",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keeps keys and certificates; by default ~/.local/state/pioneer-tunnel/certificates.",
    ),
    click.option("--acme-ca-file", type=ExistingFile(), help="PEM certificates for the authority's own web server."),
)


def with_acme(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which gets them as the argument `acme`, an `AcmeConfig` or None."""

    @functools.wraps(command)
    def wrapped(
        *arguments: Any,
        acme: bool,
        acme_directory: str | None,
        acme_email: str | None,
        acme_folder: Path | None,
        acme_ca_file: Path | None,
        **others: Any,
    ) -> None:
        given: dict[str, object] = {
            "directory": acme_directory, "email": acme_email, "folder": acme_folder, "ca_file": acme_ca_file
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if given and not acme:
            raise click.UsageError("the other options --acme-… are for --acme")
        command(*arguments, acme=_config(given) if acme else None, **others)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _config(given: dict[str, Any]) -> AcmeConfig:
    if "folder" not in given:
        given = given | {"folder": _usual_folder()}
    try:
        return AcmeConfig(terms_accepted=True, **given)
    except TunnelError as error:
        raise click.UsageError(f"--acme: {error}") from None


def _usual_folder() -> Path:
    """The folder for certificates in the one that the user has for the state of programs, which is made."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        state = (named if named.is_absolute() else Path.home() / ".local" / "state") / "pioneer-tunnel"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        raise click.UsageError(f"there is no folder for certificates ({error}); name one with --acme-folder") from None
    return state / "certificates"

"""`acme`: how certificates are ordered, as one `AcmeConfig`. `acme = true` is short for Let's Encrypt.

[relay.acme]                               # the same under [gateway.remote_access.acme]
directory = "letsencrypt-staging"          # or the https:// URL of another authority's directory
email = "operator@example.com"
terms_accepted = true
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, final

import attrs

from .._model.addresses import split_url
from .._model.errors import TunnelError
from .._storage.validation import RefusedItemsError, Rule, a_flag, a_path, a_text, hold_back, settle, structure

__all__ = ["AcmeConfig", "an_acme"]

DIRECTORIES: Final[Mapping[str, str]] = {
    "letsencrypt": "https://acme-v02.api.letsencrypt.org/directory",
    "letsencrypt-staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
}
"""The authorities that have a short name."""

_EMAIL: Final = re.compile(r"[^@\s,;:?/]+@[^@\s,;:?/]+\.[^@\s,;:?/]+")


def _directory(value: str) -> str:
    allowed = f"allowed is an https:// URL, {' or '.join(map(repr, DIRECTORIES))}"
    text = a_text(value, allowed)
    if text in DIRECTORIES:
        return DIRECTORIES[text]
    try:
        split_url(text, "it", {"https": 443})
    except ValueError:
        raise ValueError(allowed) from None
    return text


def _email(value: str) -> str:
    allowed = "allowed is an e-mail address"
    if not _EMAIL.fullmatch(a_text(value, allowed)):
        raise ValueError(allowed)
    return value


def _terms_to_accept(accepted: bool) -> str | None:
    return None if accepted else "is not true; read the authority's terms of service, and accept them with true"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class AcmeConfig:
    """How certificates are ordered and renewed.

    Made as a part of `RemoteAccessConfig` or `pioneer_tunnel.relay.RelayConfig`, or with keywords. It needs the extra
    `acme`.

    Attributes:
        directory: the authority: `letsencrypt` (default), `letsencrypt-staging`, or the URL of another one's directory.
        email: where the authority may write about the account; None (default) for nowhere.
        terms_accepted: that you have read the authority's terms of service, and accept them. It has to be True.
            `acme = true` says so, too.
        folder: keeps the account, the keys and the certificates. It is made, for its owner alone; the folder that it is
            in has to exist.
        ca_file: PEM certificates that the authority's own web server is checked against, in place of the public ones;
            for an authority of your own.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    directory: str = attrs.field(default="letsencrypt", converter=_directory)
    email: str | None = attrs.field(default=None, converter=attrs.converters.optional(_email))
    terms_accepted: bool = attrs.field(default=False, validator=a_flag)
    folder: Path = attrs.field(default=Path("certificates"), converter=a_path)
    ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))

    _RULES: ClassVar[tuple[Rule, ...]] = (Rule(("terms_accepted",), _terms_to_accept),)

    def __attrs_post_init__(self) -> None:
        settle(self)

    def below(self, folder: Path) -> AcmeConfig:
        """The same, with paths from `folder`."""
        return attrs.evolve(
            self, folder=folder / self.folder, ca_file=None if self.ca_file is None else folder / self.ca_file
        )


def an_acme(value: AcmeConfig | Mapping[str, Any] | bool | None) -> AcmeConfig | None:
    """A converter for the key: a table, true, or false for None. Problems of a table are under their own keys."""
    if isinstance(value, AcmeConfig | None):
        return value
    if isinstance(value, bool):
        return AcmeConfig(terms_accepted=True) if value else None
    try:
        return structure(AcmeConfig, value)
    except TunnelError as error:
        raise RefusedItemsError(error.problems) from None

"""`[gateway.remote_access.tls]`: the certificate with which visitors' TLS ends in the library, as one `TlsConfig`.

    [gateway.remote_access.tls]
    certificate = "office.crt"                 # the chain, PEM
    private_key = "office.key"                 # PEM, without a passphrase

Neighbours: `config.py` has this table as its key `tls`; `generation` makes a `Certificate` of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import attrs

from .._model.errors import TunnelError
from .._storage.validation import RefusedItemsError, Rule, a_path, hold_back, settle, structure

__all__ = ["TlsConfig", "a_tls"]


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class TlsConfig:
    """What visitors' TLS is ended with.

    Made as a part of `RemoteAccessConfig`, or with keywords. Paths are relative to that one's `base_dir`.

    Attributes:
        certificate: the certificate and the chain up to its authority, PEM.
        private_key: its private key, PEM, without a passphrase.

    Raises:
        InvalidSettingsError: with everything that is wrong in its `problems`.
    """

    certificate: Path = attrs.field(converter=a_path)
    private_key: Path = attrs.field(converter=a_path)

    _RULES: ClassVar[tuple[Rule, ...]] = ()

    def __attrs_post_init__(self) -> None:
        settle(self)


def a_tls(value: TlsConfig | Mapping[str, Any]) -> TlsConfig:
    """A converter: the table, with everything that is wrong in it as problems of its own keys."""
    if isinstance(value, TlsConfig):
        return value
    try:
        return structure(TlsConfig, value)
    except TunnelError as error:
        raise RefusedItemsError(error.problems) from None

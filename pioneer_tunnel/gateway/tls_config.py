"""`[gateway.remote_access.tls]`: the certificate that ends visitors' TLS in this library, as one `TlsConfig`.

[gateway.remote_access.tls]
certificate = "office.crt"                 # the chain, PEM
private_key = "office.key"                 # PEM, without a passphrase
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
    """The files of the certificate that ends visitors' TLS.

    Made as a part of `RemoteAccessConfig`, or with keywords. Paths are relative to `RemoteAccessConfig.base_dir`.

    Attributes:
        certificate: the certificate chain, PEM.
        private_key: its private key, PEM, without a passphrase.

    Raises:
        InvalidSettingsError: with all problems in `problems`.
    """

    certificate: Path = attrs.field(converter=a_path)
    private_key: Path = attrs.field(converter=a_path)

    _RULES: ClassVar[tuple[Rule, ...]] = ()

    def __attrs_post_init__(self) -> None:
        settle(self)


def a_tls(value: TlsConfig | Mapping[str, Any]) -> TlsConfig:
    """A converter for the table. Its problems are reported under their own keys."""
    if isinstance(value, TlsConfig):
        return value
    try:
        return structure(TlsConfig, value)
    except TunnelError as error:
        raise RefusedItemsError(error.problems) from None

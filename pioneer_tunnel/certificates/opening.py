"""Makes an `AcmeCertificates`, or says what is missing, without importing it earlier.

That takes a while, and most programs need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import AcmeConfig

if TYPE_CHECKING:
    from .keeper import AcmeCertificates

__all__ = ["open_certificates", "require_extra"]


def open_certificates(config: AcmeConfig, *, http: bool = False) -> AcmeCertificates:
    """See `AcmeCertificates`. Blocks.

    Raises:
        InvalidSettingsError, StorageError: as `AcmeCertificates`.
    """
    from .keeper import AcmeCertificates  # noqa: PLC0415  # see the module

    return AcmeCertificates(config, http=http)


def require_extra() -> None:
    """Check that what speaks to an authority is installed. Blocks.

    Raises:
        InvalidSettingsError: the extra `acme` is not.
    """
    from .keeper import authority_class  # noqa: PLC0415  # see the module

    authority_class()

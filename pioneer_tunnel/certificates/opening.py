"""Makes an `AcmeCertificates` without importing it earlier: that takes a while, and most programs need none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import AcmeConfig

if TYPE_CHECKING:
    from .keeper import AcmeCertificates

__all__ = ["open_certificates"]


def open_certificates(config: AcmeConfig, *, http: bool = False) -> AcmeCertificates:
    """See `AcmeCertificates`. Blocks.

    Raises:
        InvalidSettingsError, StorageError: as `AcmeCertificates`.
    """
    from .keeper import AcmeCertificates  # noqa: PLC0415  # see the module

    return AcmeCertificates(config, http=http)

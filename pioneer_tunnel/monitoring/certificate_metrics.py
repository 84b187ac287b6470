"""The metrics of certificates that a relay or a gateway orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.metrics_core import Metric

from .._model.certificate_status import CertificateStatus
from .exposition import Measure, families

__all__ = ["CERTIFICATE", "certificate_families"]

CERTIFICATE: Final[tuple[Measure[CertificateStatus], ...]] = (
    Measure(
        "certificate_expiry_timestamp_seconds",
        "When the certificate in use expires, since 1970.",
        lambda status: status.not_after_unix,
    ),
    Measure(
        "certificate_renewal_timestamp_seconds",
        "When the certificate is to be renewed, since 1970.",
        lambda status: status.renew_at_unix,
    ),
    Measure(
        "certificate_order_failed",
        "1 if the last order of the certificate failed.",
        lambda status: status.message is not None,
    ),
)
"""Of each certificate that the relay or the gateway orders."""


def certificate_families(prefix: str, certificates: Mapping[str, CertificateStatus]) -> Iterator[Metric]:
    """The metric families of certificates, by host."""
    return families(prefix, CERTIFICATE, [((host,), status) for host, status in certificates.items()], ["host"])

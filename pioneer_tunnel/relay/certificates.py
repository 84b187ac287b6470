"""The certificates of a relay: the operator's files, or those that it orders of an ACME authority for its hosts."""

from __future__ import annotations

from typing import Final, final

from .._model.addresses import is_ip_address
from .._model.certificate_status import CertificateStatus
from .._net.tls.by_name import Certificates
from .._net.tls.certificate import Certificate
from ..certificates.opening import open_certificates
from .config import RelayConfig
from .gateways.registry import LocalRegistry
from .visitors.plain import HttpAnswer

__all__ = ["RelayCertificates"]


@final
class RelayCertificates:
    """The certificates of a relay.

    Args:
        config: the configuration. Its tunnels do not matter.
        registry: whose hosts need certificates; None if its owner takes care of that.

    Attributes:
        shown: ends TLS; None when no listener needs it.
        acme: orders and renews certificates; None without `acme`.

    Raises:
        InvalidSettingsError: a certificate or a key cannot be used, or the extra `acme` is missing.
        StorageError: the folder of automatic certificates cannot be used.
    """

    def __init__(self, config: RelayConfig, registry: LocalRegistry | None) -> None:
        self._config: Final = config
        self._registry: Final = registry
        # With an address in clear, no other listener has to be at port 443 for the authority.
        by_http = config.http_addr is not None or not config.ingress_tls
        self.acme: Final = None if config.acme_config is None else open_certificates(config.acme_config, http=by_http)
        self.shown: Final[Certificate | Certificates | None] = self.acme or _of_files(config)
        self.want()

    @property
    def status(self) -> dict[str, CertificateStatus]:
        """The status of each certificate that `acme` orders, by host; empty without `acme`."""
        return {} if self.acme is None else self.acme.status

    @property
    def http_answer(self) -> HttpAnswer | None:
        """Answers the authority; None without `acme`."""
        return None if self.acme is None else self.acme.http_answer

    def want(self) -> None:
        """Order what the hosts of now need."""
        if self.acme is None:
            return
        hosts = [*self._config.public_hosts]
        if self._registry is not None and self._config.ingress_tls:
            hosts += [
                host
                for host, route in self._registry.all_hosts
                if not route.passes_tls and route.url is not None and route.url.scheme == "https"
            ]
        # No authority knows a name without a dot, and few know addresses.
        self.acme.want(host for host in hosts if "." in host and not is_ip_address(host))

    def want_at_once(self) -> None:
        """The same, also where an order has failed a short time ago."""
        self.want()
        if self.acme is not None:
            self.acme.retry_now()


def _of_files(config: RelayConfig) -> Certificate | None:
    certificate, private_key = config.tls_certificate_path, config.tls_private_key_path
    return None if certificate is None or private_key is None else Certificate(certificate, private_key)

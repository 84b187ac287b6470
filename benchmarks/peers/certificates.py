"""Certificates for relays that speak TLS."""

from __future__ import annotations

from pathlib import Path

__all__ = ["certify", "make_pkcs12"]


def certify(folder: Path, name: str) -> None:
    """Make `relay.crt` and `relay.key` for a relay of that name, and the `ca.pem` that vouches for them."""
    import trustme  # only who races with TLS needs it

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert(name)
    certificate.cert_chain_pems[0].write_to_path(str(folder / "relay.crt"))
    certificate.private_key_pem.write_to_path(str(folder / "relay.key"))


def make_pkcs12(folder: Path, password: str) -> None:
    """The same pair as `relay.p12`."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
    from cryptography.x509 import load_pem_x509_certificate

    private_key = load_pem_private_key((folder / "relay.key").read_bytes(), None)
    certificate = load_pem_x509_certificate((folder / "relay.crt").read_bytes())
    assert isinstance(private_key, EllipticCurvePrivateKey)
    bundle = pkcs12.serialize_key_and_certificates(
        b"relay", private_key, certificate, None, BestAvailableEncryption(password.encode())
    )
    (folder / "relay.p12").write_bytes(bundle)

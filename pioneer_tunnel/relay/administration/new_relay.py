"""The files of a new relay: its configuration, the key of its identity, and a unit for systemd.

An identity that is there is kept: gateways may have pinned it. Everything else is replaced only when the caller has
asked. The functions block.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Final, Literal, TypeAlias, final

import attrs
import tomlkit

from ..._model.addresses import Address, RelayAddress, is_ip_address, is_loopback, normal_audience
from ..._model.errors import StorageError
from ..._model.keys import SigningIdentity
from ..._storage import files
from ..config import RelayConfig, config_of
from ..identity import identity_of
from ..tunnels import LABEL_LIMIT
from .unit import unit_text

__all__ = [
    "TERMS",
    "CertificateFiles",
    "NewRelay",
    "Tls",
    "write_new_relay",
]

CONFIG_NAME: Final = "relay.toml"
IDENTITY_NAME: Final = "identity.hex"
UNIT_NAME: Final = "pioneer-relay.service"

TERMS: Final = "https://letsencrypt.org/repository/"
"""The terms of service of Let's Encrypt."""

CERTIFICATES_NAME: Final = "certificates"
"""The folder for what is ordered, beside the configuration."""

HTTP_PORT: Final = 80
"""Where an authority looks."""

PROXY_PORT: Final = 8080
"""Where a relay behind a proxy listens, on loopback."""


def _absolute(path: Path) -> Path:
    return path.absolute()


def _printable(_instance: object, _field: object, path: Path) -> None:
    if not str(path).isprintable():  # a line feed would be another line of the unit
        raise ValueError(f"{str(path)!r} has characters that cannot be printed; choose another path")


@final
@attrs.frozen
class CertificateFiles:
    """TLS ends at the relay, with these PEM files."""

    certificate: Path = attrs.field(validator=_printable)
    private_key: Path = attrs.field(validator=_printable)


Tls: TypeAlias = CertificateFiles | Literal["acme", "proxy", "none"]
"""Where TLS ends: at the relay, with files or with certificates of Let's Encrypt; at a proxy in front; or nowhere."""


@final
@attrs.frozen(kw_only=True)
class NewRelay:
    """What the operator has decided.

    Attributes:
        public_name: by which gateways dial the relay, `host` or `host:port`.
        tls: where TLS ends.
        folder: where the files go. Its parent exists.
        listen: the address for gateways and visitors; None for the one that follows from the name and from `tls`.

    Raises:
        ValueError: the name is not one, no authority gives a certificate for it, or a path cannot be printed.
    """

    public_name: str = attrs.field(converter=normal_audience)
    tls: Tls
    folder: Path = attrs.field(converter=_absolute, validator=_printable)
    listen: Address | None = None

    def __attrs_post_init__(self) -> None:
        host = self.dialled.host
        if self.tls == "acme" and (is_ip_address(host) or is_loopback(host) or "." not in host):
            raise ValueError(f"Let's Encrypt certifies no {host!r}; with acme the relay needs a name in the public DNS")

    @property
    def dialled(self) -> RelayAddress:
        """What gateways dial."""
        return RelayAddress.parse(f"{'ws' if self.tls == 'none' else 'wss'}://{self.public_name}")

    @property
    def address(self) -> Address:
        """Where the relay listens."""
        if self.listen is not None:
            return self.listen
        if self.tls == "proxy":
            return Address("127.0.0.1", PROXY_PORT)
        host, port = self.dialled.host, self.dialled.port
        if is_loopback(host):
            return Address(host if is_ip_address(host) else "127.0.0.1", port)
        return Address("::" if socket.has_dualstack_ipv6() else "0.0.0.0", port)  # noqa: S104  # it is for everybody

    @property
    def http_address(self) -> Address | None:
        """Where the relay answers the authority, and sends visitors without TLS to https://; None for nowhere."""
        return Address(self.address.host, HTTP_PORT) if self.tls == "acme" else None

    @property
    def certificates_path(self) -> Path | None:
        """The folder for ordered certificates; None if none are ordered."""
        return self.folder / CERTIFICATES_NAME if self.tls == "acme" else None

    @property
    def config_path(self) -> Path:
        """The configuration."""
        return self.folder / CONFIG_NAME

    @property
    def identity_path(self) -> Path:
        """The seed of the identity."""
        return self.folder / IDENTITY_NAME

    @property
    def unit_path(self) -> Path:
        """The unit for systemd."""
        return self.folder / UNIT_NAME


def write_new_relay(
    new: NewRelay, *, program: list[str], user: str, replace: bool
) -> tuple[RelayConfig, SigningIdentity]:
    """Write the files. If one cannot be written, none is new.

    Args:
        new: what the operator has decided.
        program: the command of this package, for the unit.
        user: as whom the unit runs the relay.
        replace: replace a configuration and a unit that exist.

    Raises:
        StorageError: a file cannot be written, or exists.
        InvalidSettingsError: the configuration would not be valid, or the identity that is there is not one.
    """
    text = _config_text(new).encode()
    config = config_of(text, new.config_path)
    files.make_private_folder(new.folder)
    if new.certificates_path is not None:
        files.make_private_folder(new.certificates_path)  # the unit names it
    with files.locked(new.config_path):
        files.remove_temporaries(new.folder)
        made: list[Path] = []
        try:
            if not files.exists(new.identity_path):
                seed = secrets.token_bytes(32)
                made.append(new.identity_path)
                public_key = SigningIdentity.from_seed(seed).public_key
                files.replace(new.identity_path, memoryview(f"{seed.hex()}\n{public_key}\n".encode()), private=True)
            identity = identity_of(config)
            assert identity is not None
            unit = unit_text(
                command=[*program, "relay", "--config", str(new.config_path)],
                user=user,
                port=min(address.port for address in (new.address, new.http_address) if address is not None),
                writes=new.certificates_path,
            )
            for path, content in ((new.unit_path, unit.encode()), (new.config_path, text)):
                if files.exists(path):
                    if not replace:
                        raise StorageError(f"{path} exists already")
                else:
                    made.append(path)
                files.replace(path, content)
        except BaseException:
            for path in made:
                files.remove(path)
            raise
    return config, identity


def _config_text(new: NewRelay) -> str:
    address = _quoted(str(new.address))
    lines = [
        "# A relay of pioneer-tunnel. 'pioneer-tunnel relay check' checks this file, docs/operating.md has all keys.",
        "",
        "[relay]",
        f"id = {_quoted(new.dialled.host[:LABEL_LIMIT])}",
        f"control_addr = {address}",
        f"ingress_addr = {address}",
        f"public_names = [{_quoted(new.public_name)}]",
        f"identity_key_file = {_quoted(IDENTITY_NAME)}",
    ]
    comments = [
        "the relay's name; gateways' proofs are bound to it",
        "gateways connect here",
        "visitors connect here, at the same port",
        "how gateways dial the relay; with the port, unless it is the default one",
        "proves the relay to gateways; keep it secret, and keep it",
    ]
    if isinstance(new.tls, CertificateFiles):
        lines += [
            f"tls_certificate = {_quoted(_from(new.folder, new.tls.certificate))}",
            f"tls_private_key = {_quoted(_from(new.folder, new.tls.private_key))}",
        ]
        comments += ["the certificate and its chain", "both are read again when they change"]
    elif new.http_address is not None:
        lines.append(f"http_addr = {_quoted(str(new.http_address))}")
        comments.append("answers Let's Encrypt, and sends visitors without TLS to https://")
    elif new.tls == "proxy":
        lines.append('trust_forwarded_from = ["127.0.0.1", "::1"]')
        comments.append("the proxy in front, which ends TLS")
    width = max(len(line) for line in lines[3:])
    commented = [f"{line:<{width}}  # {comment}" for line, comment in zip(lines[3:], comments, strict=True)]
    acme = [
        "",
        "[relay.acme]",
        '# directory = "letsencrypt-staging"  # to try it: no browser trusts its certificates, but its limits are high',
        '# email = "you@example.com"          # where the authority may write',
        f"terms_accepted = true              # the terms of Let's Encrypt: {TERMS}",
    ]
    after = [
        *(acme if new.tls == "acme" else []),
        "",
        "# Each tunnel has an entry [[relay.tunnels]] below: 'pioneer-tunnel relay add NAME' writes one, and",
        "# 'pioneer-tunnel relay remove NAME' removes it. A running relay reads this file when it changes.",
    ]
    return "\n".join([*lines[:3], *commented, *after, ""])


def _quoted(text: str) -> str:
    return tomlkit.item(text).as_string()


def _from(folder: Path, file: Path) -> str:
    absolute = file.absolute()
    return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)

"""Which proxy leads to a relay: the configuration's, that of the environment, or none.

`HTTPS_PROXY` names the environment's proxy, whatever the scheme of the relay's address: all transports need a tunnel,
as https does. Without it `ALL_PROXY` does. `HTTP_PROXY` is not read: a web server puts the header `Proxy` of a visitor
there (CGI). `NO_PROXY` lists the relays without a proxy. Each name in lower case wins over the one in upper case. An
empty variable counts as not set. A relay on loopback has no proxy of the environment. No I/O.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

import attrs

from ..._model.addresses import is_ip_address, is_loopback
from ..._model.errors import InvalidSettingsError
from ..._model.proxies import DIRECT, Direct, Proxy

__all__ = ["WITHOUT_PROXY", "ChosenProxy", "ProxyChoice", "no_proxy_matches"]

_NAMES: Final = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_EXCEPTIONS: Final = ("no_proxy", "NO_PROXY")
_ENTRY: Final = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>[0-9]{1,5}))?")


@final
@attrs.frozen
class ChosenProxy:
    """The proxy for one relay.

    Attributes:
        proxy: the proxy.
        variable: the environment variable that names it; None when the configuration does.
    """

    proxy: Proxy
    variable: str | None = None


@final
@attrs.frozen(kw_only=True)
class ProxyChoice:
    """How the proxy for a relay is chosen.

    Attributes:
        configured: the proxy for every relay, or `"none"`; None (default) asks `environment`.
        credentials_file: the file with the credentials for `configured`; None for those that it has.
        environment: the variables that may name a proxy; by default those of this process.
    """

    configured: Proxy | Direct | None = None
    credentials_file: Path | None = None
    environment: Mapping[str, str] = attrs.field(factory=lambda: os.environ, repr=False, eq=False)

    def for_dialer(self, *, own: bool) -> ProxyChoice:
        """This choice without the environment, if the host has a dialer of its `own`: a network of its own, or a test.

        The environment of the machine says nothing about either.
        """
        return attrs.evolve(self, environment={}) if own else self

    def proxy_for(self, host: str, port: int) -> ChosenProxy | None:
        """The proxy to the relay at `host` and `port`; None to dial it directly.

        Raises:
            InvalidSettingsError: the environment's proxy cannot be used.
        """
        if self.configured == DIRECT:
            return None
        if isinstance(self.configured, Proxy):
            return ChosenProxy(self.configured)
        variable = next((name for name in _NAMES if self.environment.get(name, "").strip()), None)
        if variable is None or is_loopback(host):
            return None
        exceptions = next((self.environment[name] for name in _EXCEPTIONS if self.environment.get(name)), "")
        if no_proxy_matches(exceptions, host, port):
            return None
        try:
            return ChosenProxy(Proxy.parse(self.environment[variable].strip()), variable)
        except ValueError as error:
            raise InvalidSettingsError(
                f"the environment variable {variable}: {error}; known are http://, https:// and socks5:// with a host"
                ' and a port, and proxy = "none" dials without it'
            ) from None


WITHOUT_PROXY: Final = ProxyChoice(configured=DIRECT)
"""Every relay is dialled directly."""


def no_proxy_matches(exceptions: str, host: str, port: int) -> bool:
    """Whether `NO_PROXY` has an entry for a relay. Entries are separated by commas or white space.

    `*` is every relay. `example.com`, `.example.com` and `*.example.com` are that name and all names below it. An IP
    address, or a network such as `10.0.0.0/8`, is a relay that is dialled by an address; no name is resolved for it.
    `:port` after a name, an IPv4 address or a `[v6]` address restricts an entry to that port.
    """
    return any(_entry_matches(entry, host.lower(), port) for entry in re.split(r"[\s,]+", exceptions) if entry)


def _entry_matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if is_ip_address(entry):
        return _is_within(host, entry)
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return _is_within(host, entry)
    if match["port"] and int(match["port"]) != port:
        return False
    if match["v6"] is not None or is_ip_address(host):
        return _is_within(host, match["v6"] or match["host"])
    name = match["host"].lower().removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _is_within(host: str, network: str) -> bool:
    """Whether `host` is an address in `network`, an address itself or written with a prefix length."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False

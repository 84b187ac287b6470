"""The access rules of a service, as one frozen `Access`: a table of a relay's or a gateway's configuration.

[relay.tunnels.access]                     # or [gateway.remote_access.access]
deny = ["192.0.2.7"]
basic_auth = "visitors.htpasswd"
open_paths = ["/healthz"]
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias, final

import attrs

from .._model.errors import InvalidSettingsError, Problem
from .._model.text import redact_reason, shown
from .._storage.networks import Network, networks
from .._storage.validation import RefusedItemsError, Rule, a_path, a_text, hold_back, one_of, settle, structure

__all__ = ["Access", "an_access"]

_Preflights: TypeAlias = Literal["pass", "refuse"]

_MOST_PATHS: Final = 64
# What every reader of a URL understands in one way: no percent sign, `\`, `;`, `//`, and no segment of dots alone.
_PATH: Final = re.compile(r"/|(?:/(?!\.+(?:/|\Z))[A-Za-z0-9._~-]+)+")
_REALM: Final = re.compile(r"[ -~]{1,128}")


def _networks(value: Sequence[str | Network]) -> tuple[Network, ...]:
    found = networks(value)
    if not found:
        raise ValueError("names no network; leave it out")
    problems = []
    for index, network in enumerate(found):
        if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
            key, message = f"[{index}]", "has IPv4 addresses that are mapped into IPv6; write them as IPv4"
            problems.append(Problem(key=key, value=shown(key, str(network)), message=message))
    if problems:
        raise RefusedItemsError(problems)
    return found


def _open_paths(value: Sequence[str]) -> tuple[str, ...]:
    allowed = "allowed is an array of paths, as /healthz"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(allowed)
    if len(given) > _MOST_PATHS:
        raise ValueError(f"allowed are {_MOST_PATHS} paths at most")
    problems = []
    for index, path in enumerate(given):
        try:
            if not _PATH.fullmatch(a_text(path, allowed)):
                raise ValueError(
                    "allowed is a path of letters, digits, '-', '.', '_' and '~' between single slashes, as /healthz"
                )
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, path), message=redact_reason(str(error), path)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(given)


def _realm(_instance: Any, _field: Any, value: Any) -> None:
    allowed = "allowed are 1 to 128 printable ASCII characters"
    if not _REALM.fullmatch(a_text(value, allowed)):
        raise ValueError(allowed)


def _two_ways(tokens: Path | None, passwords: Path | None) -> str | None:
    if tokens is None or passwords is None:
        return None
    return "stands beside basic_auth, and both are in the Authorization header; leave one of them out"


def _nothing_to_exempt(value: object, passwords: Path | None, tokens: Path | None) -> str | None:
    if not value or value == "refuse" or passwords is not None or tokens is not None:
        return None
    return "exempts requests from basic_auth or bearer_tokens, and there is neither"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back, cache_hash=True)
class Access:
    """Who may reach a service. Without any key, everybody may.

    A visitor has to pass all rules that are set: the networks first, then the password or the token.

    Attributes:
        allow: networks and addresses whose visitors may reach the service; None (default) for all.
        deny: networks and addresses whose visitors may not, also if `allow` has them. The order does not matter. With
            `allow` or `deny`, a visitor whose address is not known is refused.
        basic_auth: an htpasswd file with bcrypt hashes: visitors need a user and a password of it, for HTTP services.
            It takes the extra `access`.
        bearer_tokens: a file with a token on each line: visitors need one of them, for HTTP services.
        realm: the name that a browser shows when it asks for the password; printable ASCII.
        open_paths: paths that need neither password nor token, such as `/healthz`. See docs/access.md for what a
            request of such a path must not have.
        preflights: whether CORS preflights, which never carry credentials, pass without them (`pass`), or are refused
            like other requests (`refuse`, default).

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    allow: tuple[Network, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_networks))
    deny: tuple[Network, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_networks))
    basic_auth: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    bearer_tokens: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    realm: str = attrs.field(default="restricted", validator=_realm)
    open_paths: tuple[str, ...] = attrs.field(default=(), converter=_open_paths)
    preflights: _Preflights = attrs.field(default="refuse", validator=one_of("pass", "refuse"))

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("bearer_tokens", "basic_auth"), _two_ways),
        Rule(("open_paths", "basic_auth", "bearer_tokens"), _nothing_to_exempt),
        Rule(("preflights", "basic_auth", "bearer_tokens"), _nothing_to_exempt),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    def below(self, folder: Path) -> Access:
        """The same rules, with paths of files that start from `folder`."""
        passwords, tokens = self.basic_auth, self.bearer_tokens
        return attrs.evolve(
            self,
            basic_auth=None if passwords is None else folder / passwords,
            bearer_tokens=None if tokens is None else folder / tokens,
        )

    @property
    def needs_http(self) -> bool:
        """Whether visitors have to send a password or a token, so that they have to speak HTTP."""
        return self.basic_auth is not None or self.bearer_tokens is not None

    @property
    def names_networks(self) -> bool:
        """Whether visitors' addresses matter."""
        return self.allow is not None or self.deny is not None


def an_access(value: Access | Mapping[str, Any]) -> Access:
    """A converter for the table. Its problems are reported under their own keys."""
    if isinstance(value, Access):
        return value
    try:
        return structure(Access, value)
    except InvalidSettingsError as error:
        raise RefusedItemsError(error.problems) from None

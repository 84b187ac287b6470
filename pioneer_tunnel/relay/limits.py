"""`[relay.limits]`: what all visitors, one address, and one tunnel may cost the relay.

    [relay.limits]
    connections_per_address = 64
    exempt = ["127.0.0.0/8", "::1/128", "10.0.0.5/32"]          # the proxy in front

Neighbours: `config` has it as `limits`; `admission` counts and keeps to it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import ClassVar, TypeAlias, final

import attrs

from .._model.errors import Problem
from .._model.text import redact_reason, shown
from .._storage.validation import RefusedItemsError, Rule, a_text, hold_back, settle, whole_number

__all__ = ["Network", "RelayLimits"]

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(value: Sequence[str | Network]) -> tuple[Network, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of addresses and networks, as 192.0.2.7 or 2001:db8::/32")
    networks: list[Network] = []
    problems = []
    for index, item in enumerate(value):
        try:
            networks.append(item if isinstance(item, Network) else _network(item))
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, item), message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(networks)


def _network(text: str) -> Network:
    allowed = "allowed is an address or a network, as 192.0.2.7 or 2001:db8::/32"
    try:
        return ipaddress.ip_network(a_text(text, allowed))
    except ValueError:
        raise ValueError(allowed) from None


def _below_the_first(longest: int, first: int) -> str | None:
    return None if longest >= first else f"is below failed_auth_delay_ms, {first}"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class RelayLimits:
    """What the relay lets others cost it. Where a limit may be 0, that is: no limit.

    An address is an IPv4 address, or 64 bits of an IPv6 address, which is what one customer gets at least.

    Attributes:
        connections: open connections at all doors together. Never more than the process may have descriptors for,
            whatever this says.
        reserved_for_gateways: of these, how many visitors may not take, at most half; an eighth unless given. So a
            gateway gets in however many visitors there are. A relay with more gateways than that needs a larger value.
        connections_per_address: of these, from one address (0: no limit).
        pending: of these, how many may not have shown yet what they want: TLS, a request head, a gateway's proof. One
            more, and the oldest of them makes way. At most half of `connections`, whatever this says.
        pending_per_address: the same for one address (0: no limit).
        connects_per_second_per_address: new connections from one address, in the long run; four seconds' worth of
            them may come at once (0: no limit).
        streams_per_tunnel: visitors that one tunnel may have at a time (0: no limit); 3/16 of all connections unless
            given, which are 1536 of 8192. So four tunnels do not use up the connections of all.
        opens_per_second_per_tunnel: new visitors of one tunnel, in the long run; four seconds' worth of them may come
            at once (0: no limit).
        buffered_bytes_per_tunnel: of what a gateway sends, what the relay holds while visitors do not take it. Beyond,
            the greediest of its streams is reset.
        unsent_bytes_per_tunnel: what the relay has read and holds while a gateway or its visitors do not take it.
            Beyond, each visitor has 4 KiB in each direction, and the other end has to wait.
        unsent_bytes: the same for all tunnels together.
        failed_auth_delay_ms: how long the first rejected proof of an address waits for its answer; with each further
            one the time doubles (0: not at all). Ten minutes without one and it is forgotten.
        failed_auth_delay_max_ms: the longest such wait.
        keep_alive_timeout_ms: how long a visitor's connection may be kept between requests: from the end of the last
            response to the first byte of the next request (0: no limit).
        exempt: addresses and networks that no limit per address holds for: a proxy in front, whose address is that of
            all its visitors.

    Raises:
        InvalidSettingsError: with everything that is wrong in its `problems`.
    """

    connections: int = attrs.field(default=8192, validator=whole_number(16))
    reserved_for_gateways: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(0)))
    connections_per_address: int = attrs.field(default=256, validator=whole_number(0))
    pending: int = attrs.field(default=512, validator=whole_number(1))
    pending_per_address: int = attrs.field(default=64, validator=whole_number(0))
    connects_per_second_per_address: int = attrs.field(default=50, validator=whole_number(0))
    streams_per_tunnel: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(0)))
    opens_per_second_per_tunnel: int = attrs.field(default=2000, validator=whole_number(0))
    buffered_bytes_per_tunnel: int = attrs.field(default=64 * 1024 * 1024, validator=whole_number(1024 * 1024))
    unsent_bytes_per_tunnel: int = attrs.field(default=16 * 1024 * 1024, validator=whole_number(1024 * 1024))
    unsent_bytes: int = attrs.field(default=128 * 1024 * 1024, validator=whole_number(1024 * 1024))
    failed_auth_delay_ms: int = attrs.field(default=250, validator=whole_number(0, 5000))
    failed_auth_delay_max_ms: int = attrs.field(default=5000, validator=whole_number(0, 8000))
    keep_alive_timeout_ms: int = attrs.field(default=300_000, validator=whole_number(0))
    exempt: tuple[Network, ...] = attrs.field(default=("127.0.0.0/8", "::1/128"), converter=_networks)

    _RULES: ClassVar[tuple[Rule, ...]] = (Rule(("failed_auth_delay_max_ms", "failed_auth_delay_ms"), _below_the_first),)

    def __attrs_post_init__(self) -> None:
        settle(self)

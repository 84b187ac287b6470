"""`[relay.limits]`: what all visitors, one address, and one tunnel may cost the relay.

    [relay.limits]
    connections_per_address = 64
    exempt = ["127.0.0.0/8", "::1/128", "10.0.0.5/32"]          # the proxy in front

A key that is missing has its default.
"""

from __future__ import annotations

from typing import ClassVar, final

import attrs

from .._storage.networks import Network, networks
from .._storage.validation import Rule, hold_back, settle, whole_number

__all__ = ["RelayLimits"]


def _below_the_first(longest: int, first: int) -> str | None:
    return None if longest >= first else f"is below failed_auth_delay_ms, {first}"


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class RelayLimits:
    """What others may cost the relay. 0 means no limit, where 0 is allowed and nothing else is said.

    An address here is an IPv4 address or an IPv6 /64, the smallest network that one customer gets.

    Attributes:
        connections: open connections at all listeners together (default 8192, at least 16). Never more than the process
            may open descriptors for, less 64.
        reserved_for_gateways: how many of `connections` visitors may not take (default: an eighth; at most half is
            used). So gateways can connect however many visitors there are. A relay with more gateways than this needs
            a larger value.
        connections_per_address: open connections from one address (default 256; 0: no limit).
        pending: connections whose TLS handshake, request head or gateway's proof is not complete (default 512, at least
            1; at most half of `connections` is used). One more evicts the oldest of them.
        pending_per_address: the same for one address (default 64; 0: no limit).
        connects_per_second_per_address: average rate of new connections from one address (default 50; 0: no limit). A
            burst may have the connections of 4 seconds.
        handshakes_per_second: gateways that may connect per second, on average (default 200; 0: no limit). A burst may
            have the gateways of a second. The others are asked to come later, each at another time. It also says how
            gateways come back after a loss: see docs/operating.md.
        streams_per_tunnel: visitors of one tunnel at a time (0: no limit). The default is 3/16 of all connections,
            which is 1536 of 8192, so that four tunnels cannot use up the connections of all.
        opens_per_second_per_tunnel: average rate of new visitors of one tunnel (default 2000; 0: no limit). A burst may
            have the visitors of 4 seconds.
        buffered_bytes_per_tunnel: bytes from a gateway that its visitors have not taken (default 64 MiB, at least
            1 MiB). Beyond, the stream of the gateway that holds most is reset. The links of a gateway share it.
        unsent_bytes_per_tunnel: bytes that the relay has read and holds because a gateway or its visitors do not take
            them (default 16 MiB, at least 1 MiB). Beyond, each visitor gets 4 KiB in each direction, and the sender has
            to wait. Each link of a gateway has as much.
        unsent_bytes: the same for all tunnels together (default 128 MiB, at least 1 MiB).
        failed_auth_delay_ms: the delay of the answer to an address's first wrong proof (default 250, at most 5000; 0:
            no delay). Each further one doubles it. After 10 minutes without a wrong proof it starts from the beginning.
        failed_auth_delay_max_ms: the bound of that delay (default 5000, at most 8000).
        keep_alive_timeout_ms: how long a visitor's connection may be idle between requests: from the end of the last
            response to the first byte of the next request (default 300 000; 0: no limit).
        suspended_sessions: sessions without connection that wait for their gateway, at a time (default 1024; 0: none).
            Beyond, the one that waits for the longest time ends.
        suspended_bytes: bytes that all of these hold for their gateways and visitors (default 128 MiB, at least 1 MiB).
            Beyond, the one that holds most ends.
        exempt: addresses and networks without limits per address (default: loopback). Name a proxy in front here,
            unless it says who visits (`accept_proxy_from`, `trust_forwarded_from`): all its visitors have its address.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    connections: int = attrs.field(default=8192, validator=whole_number(16))
    reserved_for_gateways: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(0)))
    connections_per_address: int = attrs.field(default=256, validator=whole_number(0))
    pending: int = attrs.field(default=512, validator=whole_number(1))
    pending_per_address: int = attrs.field(default=64, validator=whole_number(0))
    connects_per_second_per_address: int = attrs.field(default=50, validator=whole_number(0))
    handshakes_per_second: int = attrs.field(default=200, validator=whole_number(0))
    streams_per_tunnel: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(0)))
    opens_per_second_per_tunnel: int = attrs.field(default=2000, validator=whole_number(0))
    buffered_bytes_per_tunnel: int = attrs.field(default=64 * 1024 * 1024, validator=whole_number(1024 * 1024))
    unsent_bytes_per_tunnel: int = attrs.field(default=16 * 1024 * 1024, validator=whole_number(1024 * 1024))
    unsent_bytes: int = attrs.field(default=128 * 1024 * 1024, validator=whole_number(1024 * 1024))
    failed_auth_delay_ms: int = attrs.field(default=250, validator=whole_number(0, 5000))
    failed_auth_delay_max_ms: int = attrs.field(default=5000, validator=whole_number(0, 8000))
    keep_alive_timeout_ms: int = attrs.field(default=300_000, validator=whole_number(0))
    suspended_sessions: int = attrs.field(default=1024, validator=whole_number(0))
    suspended_bytes: int = attrs.field(default=128 * 1024 * 1024, validator=whole_number(1024 * 1024))
    exempt: tuple[Network, ...] = attrs.field(default=("127.0.0.0/8", "::1/128"), converter=networks)

    _RULES: ClassVar[tuple[Rule, ...]] = (Rule(("failed_auth_delay_max_ms", "failed_auth_delay_ms"), _below_the_first),)

    def __attrs_post_init__(self) -> None:
        settle(self)

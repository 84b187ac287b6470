"""Connects a visitor's stream to the local gateway: dials it, sends a PROXY header if asked to, and pumps the bytes."""

from __future__ import annotations

import logging
from typing import Final, Literal, TypeAlias

import trio

from .._model.addresses import Address
from .._model.errors import LocalGatewayError
from .._net.closing import abandon
from .._net.dialing import Dialer, dial_local, dial_tcp
from .._net.log_limiter import LogLimiter
from ..exchange.pump import pump
from ..transports.interface import LocalDialFailed, LocalDialOk, Report
from ..transports.tunnel_stream import TunnelStream

__all__ = ["ProxyProtocol", "forward", "probe_local"]

ProxyProtocol: TypeAlias = Literal["v2"]

LOCAL_TIMEOUT: Final = 10.0

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.forward"))


def _ignore(event: object) -> None:
    """The default of `report`."""


async def probe_local(local: Address, *, dial: Dialer = dial_tcp) -> None:
    """Connect to the gateway at `local` and close the connection at once.

    Args:
        local: where the gateway listens.
        dial: makes the connection.

    Raises:
        LocalGatewayError: it does not answer within 10 seconds, or `dial` fails in any other way.
    """
    try:
        connection = await dial_local(local, dial=dial, timeout=LOCAL_TIMEOUT)
    except LocalGatewayError:
        raise
    except Exception as error:
        # A host's own `dial` may raise anything. A probe must never end the tunnel.
        raise LocalGatewayError(f"the local gateway at {local} cannot be dialled: {type(error).__name__}") from error
    await connection.aclose()


async def forward(
    stream: TunnelStream,
    local: Address,
    *,
    proxy_protocol: ProxyProtocol | None = None,
    report: Report = _ignore,
    dial: Dialer = dial_tcp,
) -> None:
    """Connect `stream` to the gateway at `local` and carry bytes both ways until both have ended.

    To the gateway the connection looks local: it comes from this host. With `proxy_protocol="v2"` it begins with a
    PROXY protocol v2 header that names the visitor. The gateway has to expect that header.

    When the gateway does not answer within 10 seconds, the visitor is reset. Returns when the visitor's connection is
    over, whether it went well or not. Raises only `trio.Cancelled`, and then resets both ends.

    Args:
        stream: the visitor's stream.
        local: where the gateway listens.
        proxy_protocol: `"v2"` for a PROXY header; None for none (default).
        report: gets an event that says whether the gateway answered.
        dial: makes the connection.
    """
    try:
        try:
            connection = await dial_local(local, dial=dial, timeout=LOCAL_TIMEOUT)
        except LocalGatewayError as error:
            _log_limiter.log(local, f"{error}; a visitor was turned away")
            report(LocalDialFailed(str(error)))
            return
        report(LocalDialOk())
        if proxy_protocol == "v2":
            try:
                await connection.send_all(stream.proxy_header.encode())
            except trio.BrokenResourceError:
                pass  # the pump gets the same error, and handles it
            except BaseException:
                await abandon(connection)
                raise
        await pump(stream, connection)
    except Exception as error:  # noqa: BLE001  # it must not affect other visitors
        _log_limiter.log("unforeseen", "a visitor could not be forwarded", level=logging.ERROR, error=error)
    finally:
        stream.reset()  # does nothing after a graceful end

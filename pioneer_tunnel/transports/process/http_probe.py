"""Asks a site for its HTTP status. By this the transport `process` sees whether the tunnel of its program is up."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final

import h11
import trio

from ..._model.addresses import RelayAddress
from ..._model.errors import RelayConnectError, RelayResolveError
from ..._net.dialing import Dialer, dial_relay
from ..._net.proxies.choice import WITHOUT_PROXY, ProxyChoice
from ..._net.tls.client import why_alerted
from ..._version import __version__
from ..redial import Redial
from .config import ProbeUrl

__all__ = ["ask_for_status"]

_READ_SIZE: Final = 16 * 1024


async def ask_for_status(
    url: ProbeUrl,
    *,
    dial: Dialer,
    make_tls: Callable[[], ssl.SSLContext],
    timeout: float,
    proxy: ProxyChoice = WITHOUT_PROXY,
    redial: Redial | None = None,
) -> int | str:
    """The HTTP status of the answer of `url`, or a sentence that says why there is none.

    Args:
        timeout: seconds for each of connecting, TLS, and the answer.
        proxy: which proxy leads to the site; by default none.
        redial: the memory of earlier probes and attempts; by default this probe has none.

    Raises:
        InvalidSettingsError: a file for TLS cannot be used.
    """
    redial = redial or Redial()
    address = RelayAddress(None, url.site.host, url.site.port)
    try:
        via = await redial.via(proxy, make_tls, address, timeout=timeout)
        tls = await redial.tls(make_tls, address, timeout=timeout) if url.site.scheme == "https" else None
        dial = redial.dialer(dial, timeout=timeout)
        stream, _ = await dial_relay(address, dial=dial, tls=tls, timeout=timeout, via=via, what="the site")
    except (RelayConnectError, RelayResolveError) as error:
        return str(error)
    exchange = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", url.authority),
        ("User-Agent", f"pioneer-tunnel/{__version__}"),
        ("Accept", "*/*"),
        ("Connection", "close"),
    ]
    request = exchange.send(h11.Request(method="GET", target=url.path, headers=headers))
    try:
        with trio.fail_after(timeout):
            await stream.send_all(request or b"")
            while not isinstance(event := exchange.next_event(), h11.Response):
                if event is h11.NEED_DATA:
                    data = await stream.receive_some(_READ_SIZE)
                    if not data:
                        return f"{url} closed the connection without an answer"
                    exchange.receive_data(bytes(data))
            return event.status_code
    except h11.RemoteProtocolError:
        return f"{url} does not answer as HTTP"
    except trio.TooSlowError:
        return f"{url} did not answer within {timeout:g} seconds"
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        alert = why_alerted(error, url.site.host)
        return f"{url} broke the connection" + ("" if alert is None else f": {alert}")
    finally:
        await trio.aclose_forcefully(stream)

"""Why the opening of a native session has failed, in words that help a person."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .._model.addresses import RelayAddress
from .._model.errors import RelayConnectError
from .._model.retry_after import retry_after_seconds
from .._model.text import clean_message
from .._net.tls.client import why_alerted
from ..websocket import WebSocketClosed, WebSocketRefused

__all__ = ["failures_named", "quoted"]


@contextmanager
def failures_named(address: RelayAddress) -> Iterator[None]:
    """Turn the failure of an opening into a `TunnelError` that says what a person can do."""
    try:
        yield
    except WebSocketRefused as refusal:
        raise _refused(refusal, address) from refusal
    except WebSocketClosed as error:
        raise RelayConnectError(f"{address} closed the opening with code {error.code}{quoted(error.reason)}") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        why = why_alerted(error, address.host) or f"{error}{_hint_of_tls(address)}"
        raise RelayConnectError(f"{address} broke off the opening: {why}") from error


def _refused(refusal: WebSocketRefused, address: RelayAddress) -> RelayConnectError:
    status = refusal.status
    if status is None:
        return RelayConnectError(
            f"{address} does not answer as a WebSocket: {refusal}{_hint_of_tls(address)}; nothing secret was sent"
        )
    if 300 <= status < 400:
        where = clean_message(refusal.location or "nowhere")
        return RelayConnectError(
            f"{address} answered with a redirect to {where!r}, which is not followed; is this network behind a sign-in"
            " page (a captive portal)? Nothing secret was sent"
        )
    if 200 <= status < 300:
        return RelayConnectError(
            f"{address} answered with a web page (HTTP status {status}) instead of a WebSocket; is this network behind"
            " a sign-in page (a captive portal), or the address not a relay's? Nothing secret was sent"
        )
    hint = ""
    if status == 404:
        hint = "; is this where the relay takes gateways (its control_addr), and not visitors?"
    elif status == 400:
        hint = _hint_of_tls(address)
    return RelayConnectError(
        f"{address} refused the WebSocket with HTTP status {status}{hint}",
        retry_after=retry_after_seconds(refusal.retry_after),
    )


def _hint_of_tls(address: RelayAddress) -> str:
    return "" if address.secure else "; if it speaks TLS, its address begins with wss://"


def quoted(text: str) -> str:
    """What a relay says of the reason, to be put behind ours; empty if it says nothing."""
    return f": {clean_message(text)!r}" if text else ""

"""TLS with a relay, or with a proxy on the way to it: the handshake with a deadline, and what its failure means."""

from __future__ import annotations

import ssl

import trio

from ..._model.errors import RelayConnectError
from .client import why_tls_failed
from .resumption import Resumption
from .stream import TlsStream

__all__ = ["begin_tls"]


async def begin_tls(
    stream: trio.abc.Stream,
    context: ssl.SSLContext,
    *,
    host: str,
    what: str,
    without_tls: str,
    timeout: float,
    https: bool,
    hint: str = "",
    resumption: Resumption | None = None,
) -> TlsStream:
    """Make the handshake over `stream`, which is the caller's to close when this raises.

    Args:
        host: the name that the certificate must have.
        what: names the other end, for the errors.
        without_tls: what to do if the other end has no TLS, for the errors.
        timeout: seconds.
        https: see `TlsStream`.
        hint: what the error adds if the certificate is not accepted.
        resumption: has the session of the last connection to the same end; None to begin a new one.

    Raises:
        RelayConnectError: the handshake failed, or took too long.
    """
    session = None if resumption is None else resumption.session(context, host)
    secured = TlsStream(stream, context, server_hostname=host, session=session, https=https)
    try:
        with trio.fail_after(timeout):
            await secured.do_handshake()
    except trio.TooSlowError:
        raise RelayConnectError(f"TLS with {what} was not agreed on within {timeout:g} seconds") from None
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        why = why_tls_failed(cause, context, host=host, beginning=secured.beginning, without_tls=without_tls)
        added = hint if isinstance(cause, ssl.SSLCertVerificationError) else ""
        raise RelayConnectError(f"TLS with {what} failed: {why}{added}") from error
    if resumption is not None:
        resumption.note(context, host, secured)
    return secured

"""The checks of `diagnose` against servers of the tests."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import trio
import trustme
from resolving import resolving
from rig import KEY, RELAY_NAME, read_until, relay_config

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.diagnosis.checks import Check, Name
from pioneer_tunnel.diagnosis.diagnose import diagnose
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.websocket import EngineName

CA: Final = trustme.CA(organization_name="Relays of the tests")
OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789abc")
ALL: Final = [*Name]

Handler: TypeAlias = Callable[[trio.abc.Stream], Awaitable[None]]


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(str(path))
    return path


@asynccontextmanager
async def relay_at(port: int, **changes: Any) -> AsyncIterator[Relay]:
    """A relay whose name resolves to it."""
    config = relay_config(
        control_addr=f"127.0.0.1:{port}", public_names=[f"{RELAY_NAME}:{port}", f"localhost:{port}"], **changes
    )
    with resolving("127.0.0.1"):
        async with trio.open_nursery() as nursery:
            relay = Relay(config)
            await nursery.start(relay.serve)
            yield relay
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that is no relay. It ends TLS if it has a context."""

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            if tls is None:
                await handler(stream)
            else:
                secured = trio.SSLStream(stream, tls, server_side=True)
                await secured.do_handshake()
                await handler(secured)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def answering(answer: bytes) -> Handler:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(answer)
        await stream.receive_some(1)

    return handler


async def silent(_: trio.abc.Stream) -> None:
    await trio.sleep_forever()


def page(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 0", *headers, "", ""]).encode()


async def run(
    address: str,
    key: RelayKey | None = KEY,
    *,
    engine: EngineName | None = None,
    instance: str | None = None,
    **options: Any,
) -> list[Check]:
    """All checks, each in its place, and none with a secret."""
    config = RemoteAccessConfig(relay_addr=address, **({"proxy": "none"} | options))
    servers = {"": config.local, **config.services} if "local_addr" in options else {}
    reported: list[Check] = []
    checks = await diagnose(config, key, report=reported.append, servers=servers, instance=instance, engine=engine)
    assert checks == reported
    assert [check.name for check in checks] == ALL
    assert all(secret.reveal() not in repr(checks) for secret in (KEY, OTHER_KEY))
    return checks


def of(checks: list[Check], name: Name) -> Check:
    return checks[ALL.index(name)]


def outcomes(checks: list[Check]) -> str:
    """Of each check, the first letter of its outcome."""
    return "".join(check.outcome[0] for check in checks)


def server_tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context

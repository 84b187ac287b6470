"""The files of examples/deploy in tests: changed to run here, with certificates, behind real proxies."""

from __future__ import annotations

import functools
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trustme
from rig import eventually

from pioneer_tunnel import State, Tunnel

__all__ = [
    "DEPLOY",
    "HOST",
    "RELAY_NAME",
    "VISITOR",
    "a_request",
    "changed",
    "client_tls",
    "connected",
    "needs",
    "nginx_around",
    "visiting",
    "write_certificate",
]

DEPLOY: Final = Path(__file__).parents[2] / "examples" / "deploy"
RELAY_NAME: Final = "relay.example.com"
HOST: Final = "office.example.com"
CA: Final = trustme.CA()
VISITOR: Final = "127.0.0.2"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def changed(name: str, **changes: str) -> str:
    """A file of the examples; each text that is changed has to be there."""
    text = (DEPLOY / name).read_text()
    return functools.reduce(_replace, changes.items(), text)


def _replace(text: str, change: tuple[str, str]) -> str:
    assert change[0] in text, change
    return text.replace(*change)


def write_certificate(folder: Path) -> None:
    issued = CA.issue_cert(RELAY_NAME, "*.example.com")
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "relay.crt"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "relay.pem"))
    CA.cert_pem.write_to_path(str(folder / "ca.pem"))


def nginx_around(folder: Path, _port: int) -> str:
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; {paths}\n"
    )


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


@asynccontextmanager
async def visiting(port: int) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
    connected = await trio.open_tcp_stream("127.0.0.1", port, local_address=VISITOR)
    async with trio.SSLStream(connected, client_tls(), server_hostname=HOST, https_compatible=True) as stream:
        yield stream


def a_request(*lines: str) -> bytes:
    return "\r\n".join(["GET / HTTP/1.1", f"Host: {HOST}", *lines, "", ""]).encode()


async def connected(tunnel: Tunnel) -> None:
    async def check() -> bool:
        tunnel.retry_now()  # the proxy may not listen yet
        await trio.sleep(0.1)
        return tunnel.status.state is State.CONNECTED

    await eventually(check)

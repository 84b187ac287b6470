"""Visitors whose TLS the relay passes through: the server of the application ends it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from asgi_rig import FACES, Browser, Face, no_lifespan, respond, serving

from pioneer_tunnel import Certificate


@pytest.mark.parametrize("face", FACES)
async def test_visitors_with_tls_are_served(face: Face, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("office.test")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    context = ssl.create_default_context()
    authority.configure_trust(context)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await no_lifespan(scope)
        await respond(send, f"{scope['scheme']} {scope['client'][0]}".encode())

    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    async with serving(app, face, certificate=certificate) as served, await served.visit() as stream:
        secured = trio.SSLStream(stream, context, server_hostname="office.test", https_compatible=True)
        browser = Browser(secured)
        for _ in range(2):
            assert (await browser.ask()).body == b"https 127.0.0.1"
        await secured.aclose()

"""pebble, an ACME authority for tests, as Debian packages it, and a front that adds what it does not have.

Debian's pebble has no rate limits, and knows nothing of renewal suggestions (RFC 9773). `Front` is a server before it
that passes everything on, refuses what a test tells it to refuse, and suggests when to renew. All is on loopback.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, final

import attrs
import pytest
import trustme
from rig import HANG, free_port

from pioneer_tunnel.certificates.config import AcmeConfig

__all__ = ["CA", "Front", "Pebble", "authority", "missing", "pebble", "pebble_of_the_module"]

CA: Final = trustme.CA()
"""The authority of pebble's own web server."""

_PROGRAMS: Final = ("pebble", "pebble-challtestsrv")
_HOST: Final = "127.0.0.1"


def missing() -> str | None:
    """Why pebble cannot run here; None if it can."""
    if all(map(shutil.which, _PROGRAMS)):
        return None
    return "pebble is not installed: apt-get install pebble"


@final
@attrs.define(eq=False)
class Pebble:
    """A running authority.

    Attributes:
        folder: for files.
        folder_of_orders: the folder of `config`.
        directory: the URL of its directory.
        http_port: where it looks by HTTP-01.
        tls_port: where it looks by TLS-ALPN-01.
    """

    folder: Path
    directory: str
    http_port: int
    tls_port: int
    _management: str
    _arguments: list[str]
    folder_of_orders: Path = Path()
    _process: subprocess.Popen[bytes] | None = None
    _nonces_rejected: int = 0

    def config(self, *, directory: str | None = None, **changes: Any) -> AcmeConfig:
        """The configuration of whoever orders here."""
        fields: dict[str, Any] = {
            "directory": directory or self.directory,
            "terms_accepted": True,
            "folder": self.folder_of_orders / "certificates",
            "ca_file": self.folder / "web-ca.pem",
        }
        return AcmeConfig(**(fields | changes))

    def start(self) -> None:
        """Start it, with another root, and with no memory of accounts; unless it runs."""
        if self._process is not None:
            return
        variables = {
            "PEBBLE_VA_NOSLEEP": "1",
            "PEBBLE_AUTHZREUSE": "0",
            "PEBBLE_WFE_NONCEREJECT": str(self._nonces_rejected),
        }
        with (self.folder / "pebble.log").open("ab") as log:
            self._process = subprocess.Popen(self._arguments, env=os.environ | variables, stdout=log, stderr=log)
        deadline = time.monotonic() + HANG
        while True:
            assert self._process.poll() is None, (self.folder / "pebble.log").read_text()
            try:
                self.get(self.directory)
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """End it; all that it knew is lost."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(HANG)
            self._process = None

    def get(self, url: str) -> bytes:
        with urllib.request.urlopen(url, context=client_context(), timeout=HANG) as answer:
            content: bytes = answer.read()
            return content

    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts the certificates it issues."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.root())
        return context

    def root(self) -> str:
        """The certificate that all that it issues leads to, PEM."""
        return self.get(f"{self._management}/roots/0").decode()

    def is_revoked(self, serial: int) -> bool:
        found = json.loads(self.get(f"{self._management}/cert-status-by-serial/{serial:x}"))
        return bool(found["Status"] == "Revoked")


@pytest.fixture(scope="module")
def pebble_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    with pebble(tmp_path_factory.mktemp("pebble")) as running:
        yield running


@pytest.fixture
def authority(pebble_of_the_module: Pebble, tmp_path: Path) -> Pebble:
    """An authority that runs, and that may know of other tests. Whoever orders has a new folder."""
    pebble_of_the_module.start()
    pebble_of_the_module.folder_of_orders = tmp_path
    return pebble_of_the_module


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


def server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(_HOST).configure_cert(context)
    return context


@contextmanager
def pebble(folder: Path, *, nonces_rejected: int = 0) -> Iterator[Pebble]:
    """Run an authority that resolves every name to loopback.

    Args:
        nonces_rejected: how many of a hundred nonces are refused for no reason.
    """
    why = missing()
    if why is not None:
        pytest.skip(why)
    issued = CA.issue_cert(_HOST)
    issued.private_key_pem.write_to_path(str(folder / "web.key"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "web.crt"))
    CA.cert_pem.write_to_path(str(folder / "web-ca.pem"))
    ports = {name: free_port() for name in ("listen", "management", "http", "tls", "dns", "dns-management")}
    document = {
        "listenAddress": f"{_HOST}:{ports['listen']}",
        "managementListenAddress": f"{_HOST}:{ports['management']}",
        "certificate": str(folder / "web.crt"),
        "privateKey": str(folder / "web.key"),
        "httpPort": ports["http"],
        "tlsPort": ports["tls"],
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": document}))
    resolver = [
        "pebble-challtestsrv", "-defaultIPv4", _HOST, "-defaultIPv6", "", "-http01", "", "-https01", "",
        "-tlsalpn01", "", "-dns01", f"{_HOST}:{ports['dns']}", "-management", f"{_HOST}:{ports['dns-management']}",
    ]  # fmt: skip
    arguments = ["pebble", "-strict", "-config", str(folder / "pebble.json"), "-dnsserver", f"{_HOST}:{ports['dns']}"]
    with (folder / "resolver.log").open("wb") as log:
        names = subprocess.Popen(resolver, stdout=log, stderr=log)
    running = Pebble(
        folder,
        f"https://{_HOST}:{ports['listen']}/dir",
        ports["http"],
        ports["tls"],
        f"https://{_HOST}:{ports['management']}",
        arguments,
        folder_of_orders=folder,
        nonces_rejected=nonces_rejected,
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()
        names.terminate()
        names.wait(HANG)


@final
class Front:
    """A server before pebble.

    Attributes:
        directory: the URL of the directory.
        refusals: for the end of a path, the answers to the next requests: status, headers, problem document.
        suggests: whether it suggests when to renew: at once if the certificate is revoked, else in the future.
        orders: the payloads of orders.
    """

    def __init__(self, behind: Pebble) -> None:
        self.behind: Final = behind
        self.refusals: Final[dict[str, list[tuple[int, dict[str, str], dict[str, Any]]]]] = {}
        self.suggests = False
        self.orders: Final[list[dict[str, Any]]] = []
        self._server: Final = ThreadingHTTPServer((_HOST, 0), self._handler())
        self._server.socket = server_context().wrap_socket(self._server.socket, server_side=True)
        self.directory: Final = f"https://{_HOST}:{self._server.server_port}/dir"

    @contextmanager
    def running(self) -> Iterator[Front]:
        with ExitStack() as stack:
            thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            stack.callback(self._server.server_close)
            stack.callback(thread.join)
            stack.callback(self._server.shutdown)
            yield self

    def _handler(front) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass_on()

            do_POST = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/order-plz":
                    front.orders.append(_payload(body))
                for end, answers in front.refusals.items():
                    if self.path.endswith(end) and answers:
                        status, headers, problem = answers.pop(0)
                        kind = {"Content-Type": "application/problem+json"}
                        self._answer(status, kind | headers, json.dumps(problem).encode())
                        return
                if self.path.startswith("/renewal-info/"):
                    front._suggest(self)
                    return
                status, headers, content = front._fetch(self.command, self.path, self.headers, body)
                if self.path == "/dir" and front.suggests:
                    found = json.loads(content) | {"renewalInfo": f"https://{self.headers['Host']}/renewal-info"}
                    content = json.dumps(found).encode()
                self._answer(status, headers, content)

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in {"content-length", "connection", "date", "server", "transfer-encoding"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        return Handler

    def _suggest(self, handler: Any) -> None:
        serial = handler.path.rpartition(".")[2]
        number = int.from_bytes(base64.urlsafe_b64decode(serial + "=" * (-len(serial) % 4)))
        near = time.time() + (-7200 if self.behind.is_revoked(number) else 86400 * 30)
        start, end = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) for at in (near, near + 3600))
        document = {"suggestedWindow": {"start": start, "end": end}}
        headers = {"Content-Type": "application/json", "Retry-After": "21600"}
        handler._answer(200, headers, json.dumps(document).encode())

    def _fetch(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = self.behind.directory.removesuffix("/dir") + path
        passed = {name: value for name, value in headers.items() if name.lower() != "connection"}
        request = urllib.request.Request(url, data=body or None, headers=passed, method=method)
        try:
            with urllib.request.urlopen(request, context=client_context(), timeout=HANG) as answer:
                return answer.status, _first_of_each(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _first_of_each(error.headers), error.read()


def _first_of_each(headers: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers.items():
        # `Link` comes several times: the library needs that of the authorization.
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _payload(body: bytes) -> dict[str, Any]:
    text = json.loads(body)["payload"]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return found

"""What real servers make of the headers that `forward` sets: by default, and with the setting of docs/headers.md.

The visitor comes over TLS, which the relay ends, from another address than the tunnel has.
"""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import trio
import trustme
from example_programs import ROOT, Program, running_program
from rig import HOST, eventually, free_port, no_hang, read_all, relay_rig

from pioneer_tunnel._model.addresses import local_address
from pioneer_tunnel._model.errors import LocalGatewayError
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.forward import forward, probe_local

pytestmark = pytest.mark.slow

VISITOR: Final = "127.0.0.2"
TUNNEL: Final = "127.0.0.1"
FORGED: Final = "198.51.100.66"
DOCS: Final = ROOT / "docs" / "headers.md"
CA: Final = trustme.CA()

FASTAPI: Final = """
from fastapi import FastAPI, Request

app = FastAPI()

@app.get("/who")
def who(request: Request):
    client = request.client and request.client.host
    return {"client": client, "scheme": request.url.scheme, "host": request.url.netloc}

@app.get("/folder/")
def folder():
    return {}
"""
FLASK: Final = """
from flask import Flask, request

app = Flask(__name__)

@app.get("/who")
def who():
    return {"client": request.remote_addr, "scheme": request.scheme, "host": request.host}

@app.get("/folder/")
def folder():
    return {}
"""
DJANGO: Final = """
import sys
from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponseRedirect, JsonResponse
from django.urls import path

def who(request):
    return JsonResponse(
        {{"client": request.META["REMOTE_ADDR"], "scheme": request.scheme, "host": request.get_host()}}
    )

def folder(request):
    return HttpResponseRedirect(request.build_absolute_uri("/folder/"))

urlpatterns = [path("who", who), path("folder", folder)]
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="x", {settings})
app = get_wsgi_application()
if __name__ == "__main__":
    execute_from_command_line(["manage.py", "runserver", "--noreload", sys.argv[1]])
"""
UVICORN_FIX: Final = '--forwarded-allow-ips "*"'
DJANGO_FIX: Final = 'SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")'
FLASK_FIX: Final = """
from werkzeug.middleware.proxy_fix import ProxyFix

app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1)
"""
HYPERCORN_FIX: Final = """
from hypercorn.middleware import ProxyFixMiddleware

app = ProxyFixMiddleware(app, mode="modern")
"""
CADDY_FIX: Final = "trusted_proxies 127.0.0.1/32"
NGINX_FIX: Final = """
set_real_ip_from 127.0.0.1;
real_ip_header X-Forwarded-For;
absolute_redirect off;
"""


class Case(NamedTuple):
    """A server, and what its application makes of the visitor."""

    command: list[str]
    app: str
    client: str | None
    scheme: str
    location: str


UVICORN: Final = [sys.executable, "-m", "uvicorn", "app:app", "--port", "PORT"]
GUNICORN: Final = [sys.executable, "-m", "gunicorn", "app:app", "--bind", "127.0.0.1:PORT", "--no-control-socket"]
HYPERCORN: Final = [sys.executable, "-m", "hypercorn", "app:app", "--bind", "127.0.0.1:PORT"]
UVICORN_SOCKET: Final = [sys.executable, "-m", "uvicorn", "app:app", "--uds", "SOCKET"]
GUNICORN_SOCKET: Final = [sys.executable, "-m", "gunicorn", "app:app", "--bind", "unix:SOCKET", "--no-control-socket"]
RUNSERVER: Final = [sys.executable, "app.py", "127.0.0.1:PORT"]
FLASK_RUN: Final = [sys.executable, "-m", "flask", "run", "--port", "PORT"]
SECURE: Final = f"https://{HOST}/folder/"
INSECURE: Final = f"http://{HOST}/folder/"
ANY_HOST: Final = 'ALLOWED_HOSTS=["*"]'
CASES: Final = {
    "uvicorn": Case(UVICORN, FASTAPI, VISITOR, "https", SECURE),
    "uvicorn, Unix socket": Case(UVICORN_SOCKET, FASTAPI, None, "http", INSECURE),
    "uvicorn, Unix socket, fixed": Case(
        [*UVICORN_SOCKET, *shlex.split(UVICORN_FIX)], FASTAPI, VISITOR, "https", SECURE
    ),
    "gunicorn, Unix socket": Case(GUNICORN_SOCKET, FLASK, "", "https", SECURE),
    "gunicorn, Unix socket, fixed": Case(GUNICORN_SOCKET, FLASK + FLASK_FIX, VISITOR, "https", SECURE),
    "gunicorn": Case(GUNICORN, FLASK, TUNNEL, "https", SECURE),
    "gunicorn, fixed": Case(GUNICORN, FLASK + FLASK_FIX, VISITOR, "https", SECURE),
    "hypercorn": Case(HYPERCORN, FASTAPI, TUNNEL, "http", INSECURE),
    "hypercorn, fixed": Case(HYPERCORN, FASTAPI + HYPERCORN_FIX, VISITOR, "https", SECURE),
    "Django": Case(RUNSERVER, DJANGO.format(settings=ANY_HOST), TUNNEL, "http", INSECURE),
    "Django, gunicorn": Case(GUNICORN, DJANGO.format(settings=ANY_HOST), TUNNEL, "https", SECURE),
    "Django, fixed": Case(
        RUNSERVER, DJANGO.format(settings=f"{ANY_HOST}, {DJANGO_FIX.replace(' = ', '=')}"), TUNNEL, "https", SECURE
    ),
    "Flask": Case(FLASK_RUN, FLASK, TUNNEL, "http", INSECURE),
    "Flask, fixed": Case(FLASK_RUN, FLASK + FLASK_FIX, VISITOR, "https", SECURE),
}


@asynccontextmanager
async def server(case: Case, folder: Path) -> AsyncIterator[str]:
    """Run the server of a case; yields its address."""
    port = free_port()
    (folder / "app.py").write_text(case.app)
    command = [part.replace("PORT", str(port)).replace("SOCKET", "app.sock") for part in case.command]
    local = f"unix:{folder}/app.sock" if any("app.sock" in part for part in command) else f"127.0.0.1:{port}"
    async with running_program(*command, cwd=folder) as program:
        await listens(program, local)
        yield local


async def listens(program: Program, local: str) -> None:
    async def ready() -> bool:
        assert program.process.returncode is None, program.said
        try:
            await probe_local(local_address(local))
        except LocalGatewayError:
            return False
        return True

    await eventually(ready)


@asynccontextmanager
async def exposed(local: str, folder: Path, **options: Any) -> AsyncIterator[Visitor]:
    """Expose a server, through a relay that ends TLS."""
    CA.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(folder / "relay.pem"))
    files: dict[str, Any] = {
        "tls_certificate": "relay.pem",
        "tls_private_key": "relay.pem",
        "control_tls": False,
        "base_dir": folder,
    }
    handler = functools.partial(forward, local=local, **options)
    async with relay_rig(**files) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        with no_hang():
            await tunnel.wait_connected()
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            yield Visitor(rig.addresses.ingress.port)
            nursery.cancel_scope.cancel()


class Visitor(NamedTuple):
    port: int

    async def get(self, path: str, *lines: str) -> tuple[str, str]:
        """The head and the body of a response."""
        context = ssl.create_default_context()
        CA.configure_trust(context)
        stream = await trio.open_tcp_stream("127.0.0.1", self.port, local_address=VISITOR)
        async with trio.SSLStream(stream, context, server_hostname=HOST, https_compatible=True) as visitor:
            request = [f"GET {path} HTTP/1.1", f"Host: {HOST}", *lines, "Connection: close", "", ""]
            await visitor.send_all("\r\n".join(request).encode())
            head, _, body = (await read_all(visitor)).decode("latin-1").partition("\r\n\r\n")
            return head, body

    async def who(self, *lines: str) -> dict[str, str]:
        _, body = await self.get("/who", *lines)
        said: dict[str, str] = json.loads(body[body.index("{") : body.rindex("}") + 1])
        return said

    async def location(self) -> str:
        head, _ = await self.get("/folder")
        (location,) = [line for line in head.splitlines() if line.lower().startswith("location:")]
        return location.partition(": ")[2]


FORGERIES: Final = [
    f"X-Forwarded-For: {FORGED}",
    f"X_Forwarded_For: {FORGED}",
    f"X-Real-IP: {FORGED}",
    f"Forwarded: for={FORGED};proto=http;host=evil.test",
    "X-Forwarded-Proto: http",
    "X-Forwarded-Host: evil.test",
    "X-Forwarded-Port: 1",
    "X-Forwarded-Prefix: /evil",
    "X-Forwarded-Ssl: off",
    "SCRIPT_NAME: /who",
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_what_a_server_makes_of_the_headers(case: Case, tmp_path: Path) -> None:
    async with server(case, tmp_path) as local, exposed(local, tmp_path, forwarded_headers="set") as visitor:
        expected = {"client": case.client, "scheme": case.scheme, "host": HOST}
        assert await visitor.who() == expected
        assert await visitor.who(*FORGERIES) == expected
        assert await visitor.location() == case.location


@pytest.mark.parametrize("fix", [UVICORN_FIX, DJANGO_FIX, FLASK_FIX, HYPERCORN_FIX, CADDY_FIX, NGINX_FIX])
def test_the_setting_stands_in_the_documentation(fix: str) -> None:
    assert fix.strip() in DOCS.read_text()


async def test_by_default_uvicorn_believes_a_visitor_of_a_tunnel_that_sets_nothing(tmp_path: Path) -> None:
    async with server(CASES["uvicorn"], tmp_path) as local, exposed(local, tmp_path) as visitor:
        assert await visitor.who() == {"client": TUNNEL, "scheme": "http", "host": HOST}
        assert await visitor.location() == INSECURE
        said = await visitor.who(f"X-Forwarded-For: {FORGED}", "X-Forwarded-Proto: https")
        assert said == {"client": FORGED, "scheme": "https", "host": HOST}


async def test_by_default_gunicorn_takes_the_path_from_a_visitor_of_a_tunnel_that_sets_nothing(tmp_path: Path) -> None:
    async with server(CASES["gunicorn"], tmp_path) as local:
        async with exposed(local, tmp_path) as visitor:
            assert " 404 " in (await visitor.get("/who", "SCRIPT_NAME: /who"))[0].splitlines()[0]
        async with exposed(local, tmp_path, forwarded_headers="set") as visitor:
            assert " 200 " in (await visitor.get("/who", "SCRIPT_NAME: /who"))[0].splitlines()[0]


async def test_hypercorn_is_not_offered_http_2(tmp_path: Path) -> None:
    """In HTTP/2, which hypercorn speaks after a 101, the visitor could send any header."""
    upgrade = ["Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"]
    async with server(CASES["hypercorn"], tmp_path) as local:
        async with exposed(local, tmp_path) as visitor:
            head, _ = await visitor.get("/who", "Connection: Upgrade, HTTP2-Settings", *upgrade)
            assert " 101 " in head.splitlines()[0]
        async with exposed(local, tmp_path, forwarded_headers="set") as visitor:
            head, _ = await visitor.get("/who", "Connection: Upgrade, HTTP2-Settings", *upgrade)
            assert " 200 " in head.splitlines()[0]


async def test_a_development_server_takes_the_host_that_is_set(tmp_path: Path) -> None:
    case = CASES["Django"]._replace(app=DJANGO.format(settings='DEBUG=True, ALLOWED_HOSTS=["localhost"]'))
    async with server(case, tmp_path) as local:
        async with exposed(local, tmp_path) as visitor:
            assert " 400 " in (await visitor.get("/who"))[0].splitlines()[0]
        async with exposed(local, tmp_path, host_header="localhost:3000") as visitor:
            assert (await visitor.who())["host"] == "localhost:3000"


async def test_an_application_that_needs_the_visitors_host_reads_it_from_the_headers(tmp_path: Path) -> None:
    case = CASES["Flask, fixed"]
    options: dict[str, Any] = {"forwarded_headers": "set", "host_header": "localhost:3000"}
    for fix, host in (("x_proto=1", "localhost:3000"), ("x_proto=1, x_host=1", HOST)):
        fixed = case._replace(app=case.app.replace("x_proto=1", fix))
        async with server(fixed, tmp_path) as local, exposed(local, tmp_path, **options) as visitor:
            assert (await visitor.who())["host"] == host


async def test_with_the_setting_django_redirects_nobody_who_comes_over_tls(tmp_path: Path) -> None:
    middleware = f'{ANY_HOST}, MIDDLEWARE=["django.middleware.security.SecurityMiddleware"], SECURE_SSL_REDIRECT=True'
    for settings, status in ((middleware, " 301 "), (f"{middleware}, {DJANGO_FIX.replace(' = ', '=')}", " 200 ")):
        case = CASES["Django"]._replace(app=DJANGO.format(settings=settings))
        async with server(case, tmp_path) as local, exposed(local, tmp_path, forwarded_headers="set") as visitor:
            assert status in (await visitor.get("/who"))[0].splitlines()[0]


CADDYFILE: Final = """
{{
    admin off
    auto_https off
}}
http://:{port} {{
    reverse_proxy {app} {{
        {fix}
    }}
}}
"""


@pytest.mark.skipif(shutil.which("caddy") is None, reason="Caddy is not installed")
@pytest.mark.parametrize("fixed", [False, True])
async def test_what_caddy_makes_of_the_headers(fixed: bool, tmp_path: Path) -> None:
    port = free_port()
    async with server(CASES["uvicorn"], tmp_path) as app:
        (tmp_path / "Caddyfile").write_text(CADDYFILE.format(port=port, app=app, fix=CADDY_FIX if fixed else ""))
        async with running_program("caddy", "run", "--config", tmp_path / "Caddyfile", cwd=tmp_path) as program:
            await listens(program, f"127.0.0.1:{port}")
            async with exposed(f"127.0.0.1:{port}", tmp_path, forwarded_headers="set") as visitor:
                client, scheme, location = (VISITOR, "https", SECURE) if fixed else (TUNNEL, "http", INSECURE)
                assert await visitor.who(*FORGERIES) == {"client": client, "scheme": scheme, "host": HOST}
                assert await visitor.location() == location


NGINX_CONF: Final = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {fix}
    server {{
        listen 127.0.0.1:{port};
        root .;
        location = /who {{
            return 200 '{{"client": "$remote_addr", "scheme": "$http_x_forwarded_proto", "host": "$host"}}';
        }}
    }}
}}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("fixed", [False, True])
async def test_what_nginx_makes_of_the_headers(fixed: bool, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nginx.conf").write_text(NGINX_CONF.format(port=port, fix=NGINX_FIX if fixed else ""))
    async with running_program("nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", "stderr") as program:
        await listens(program, f"127.0.0.1:{port}")
        async with exposed(f"127.0.0.1:{port}", tmp_path, forwarded_headers="set") as visitor:
            client = VISITOR if fixed else TUNNEL
            assert await visitor.who(*FORGERIES) == {"client": client, "scheme": "https", "host": HOST}
            assert await visitor.location() == ("/folder/" if fixed else f"http://{HOST}:{port}/folder/")

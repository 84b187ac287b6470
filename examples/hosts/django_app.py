"""Django without a local port, as an ASGI application. A project has the settings and the URLs in files of their own.

python examples/hosts/django_app.py wss://relay.example.com relay-key.txt

With a local server instead (`manage.py runserver`, gunicorn), use `pioneer_tunnel.blocking` as in flask_app.py.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from pioneer_tunnel import RelayKey
from pioneer_tunnel.aio import open_tunnel, serve


def home(request: HttpRequest) -> JsonResponse:
    """Say where the visitor comes from."""
    return JsonResponse({"hello": request.META["REMOTE_ADDR"]})


urlpatterns = [path("", home)]


async def main(relay: str, key: RelayKey) -> None:
    """Serve until interrupted. Only requests to the tunnel's own name are served."""
    async with open_tunnel(relay, key=key) as tunnel:
        url = (await tunnel.wait_connected()).public_url or ""
        settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=[url.partition("://")[2].partition(":")[0]])
        print(f"visitors come in at {url}", flush=True)
        await serve(get_asgi_application(), tunnel)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], RelayKey(Path(sys.argv[2]).read_text().splitlines()[0])))

"""A client of a gateway: it switches remote access on and off, saves the relay key, and watches the status.

    python examples/remote_access_client.py --token-file FOLDER/token ws://127.0.0.1:PORT COMMAND

    on, off            switch remote access
    key [FILE]         save the relay key that FILE holds; without FILE, what comes in on standard input
    forget-key         clear it
    status             what there is
    watch [STATE]      each status that is news, until the STATE

The key is never an argument: arguments are seen by everybody on the machine. The gateway may as well be reached
through its tunnel; then the URL is its public one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

TIMEOUT: Final = 20
STATUS_CHANGED: Final = "gateway/remote_access/status_changed"


class Refused(Exception):
    """The gateway answered with an error."""


@contextmanager
def understood() -> Iterator[None]:
    """What the gateway says is read here: say so when it is not what a gateway says."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"the gateway says what is not understood ({type(error).__name__})") from None


class Client:
    """JSON-RPC over a WebSocket: requests one after another, and notifications in between."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket
        self._numbers = itertools.count(1)

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the answer; what is notified meanwhile is printed."""
        number = next(self._numbers)
        request = json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        with trio.fail_after(TIMEOUT):
            await self._websocket.send_message(request)
            while True:
                message = await self._read()
                if message.get("id") == number:
                    break
                with understood():
                    show(message["params"]["status"])
        with understood():
            if "error" in message:
                raise Refused(f"the gateway refuses: {message['error']['message']} ({message['error']['code']})")
            section: dict[str, Any] = message["result"]["settings"]["remote_access"]
            return section

    async def _read(self) -> dict[str, Any]:
        with understood():
            message = json.loads(await self._websocket.get_message())
            if not isinstance(message, dict):
                raise TypeError("no object")
            return message

    async def update(self, **changes: Any) -> dict[str, Any]:
        """Change settings; returns what there is then."""
        return await self.call("settings/update", {"update": {"remote_access": changes}})

    async def watch(self, until: str | None) -> None:
        """Print each status, the present one first."""
        status = (await self.call("settings/get", {}))["status"]
        while True:
            with understood():
                show(status)
                if status["state"] == until:
                    return
                # No deadline: a quiet tunnel is a healthy one.
                status = (await self._read())["params"]["status"]


def show(status: dict[str, Any]) -> None:
    told = [status["state"], *(str(status[name]) for name in ("error_kind", "message", "public_url") if name in status)]
    print(": ".join(told), flush=True)


@asynccontextmanager
async def connected(url: str, token: str) -> AsyncIterator[Client]:
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "wss"
    port = parts.port or (443 if secure else 80)
    stream: trio.abc.Stream
    with trio.fail_after(TIMEOUT):
        stream = await trio.open_tcp_stream(host, port)
        if secure:
            stream = trio.SSLStream(stream, ssl.create_default_context(), server_hostname=host, https_compatible=True)
    async with stream, trio.open_nursery() as nursery:
        with trio.fail_after(TIMEOUT):
            websocket = await wrap_client_stream(
                nursery,
                stream,
                f"{host}:{port}",
                parts.path or "/",
                extra_headers=[(b"Authorization", f"Bearer {token}".encode())],
            )
        yield Client(websocket)
        with trio.move_on_after(1):
            await websocket.aclose()
        nursery.cancel_scope.cancel()


def read_key(file: str | None) -> str:
    """The first line: the second may be what the relay's operator needs."""
    text = sys.stdin.read() if file is None else Path(file).read_text()
    return text.strip().partition("\n")[0]


async def main(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status."""
    token = Path(arguments.token_file).read_text().strip()
    problem: str | None = None
    try:
        async with connected(arguments.url, token) as client:
            try:
                await obey(client, arguments.command, arguments.argument)
            except Refused as refusal:
                problem = str(refusal)
            except ConnectionClosed:
                problem = "the gateway has closed the connection"
    except* ConnectionRejected:
        problem = "the gateway does not let us in: is the token right?"
    except* (OSError, trio.TooSlowError, HandshakeError):
        problem = f"no gateway answers at {arguments.url}"
    if problem is not None:
        print(problem, file=sys.stderr)
    return 0 if problem is None else 1


async def obey(client: Client, command: str, argument: str | None) -> None:
    match command:
        case "on" | "off":
            section = await client.update(enabled=command == "on")
        case "key":
            section = await client.update(key=read_key(argument))
        case "forget-key":
            section = await client.update(clear_key=True)
        case "status":
            section = await client.call("settings/get", {})
        case _:
            await client.watch(argument)
            return
    print(f"enabled: {section['enabled']}, key: {section['has_key']}, relay: {section.get('server')}")
    show(section["status"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-file", required=True, help="where the gateway keeps its bearer token")
    parser.add_argument("url", help="the gateway's WebSocket")
    parser.add_argument("command", choices=["on", "off", "key", "forget-key", "status", "watch"])
    parser.add_argument("argument", nargs="?", help="FILE of `key`, STATE of `watch`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(trio.run(main, parse_arguments()))

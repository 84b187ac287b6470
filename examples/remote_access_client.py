"""A client of a gateway: it switches remote access on and off, saves the relay key, and watches the status.

    python examples/remote_access_client.py --token-file FOLDER/token ws://127.0.0.1:PORT COMMAND

    on, off            switch remote access
    key [FILE]         save the relay key from FILE, or from standard input
    forget-key         delete the relay key
    status             print settings and status
    watch [STATE]      print each new status, until STATE

The key is never an argument: all users of the machine can see arguments. To connect through the tunnel, use the
gateway's public URL.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends it at once, without a traceback

import argparse
import itertools
import json
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

TIMEOUT: Final = 20
COMMANDS: Final = ("on", "off", "key", "forget-key", "status", "watch")
STATUS_CHANGED: Final = "gateway/remote_access/status_changed"


class Refused(Exception):
    """The gateway answered with an error."""


@contextmanager
def understood() -> Iterator[None]:
    """Turn errors from reading a malformed answer into `Refused`."""
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
        """Send a request and wait for its answer; print notifications that arrive before it."""
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
        """Change settings; returns the new settings and status."""
        return await self.call("settings/update", {"update": {"remote_access": changes}})

    async def watch(self, until: str | None) -> None:
        """Print the current status and each new one."""
        status = (await self.call("settings/get", {}))["status"]
        while True:
            with understood():
                show(status)
                if status["state"] == until:
                    return
                # No deadline: the status of a healthy tunnel does not change.
                status = (await self._read())["params"]["status"]


def show(status: dict[str, Any]) -> None:
    parts = [
        status["state"],
        *(str(status[name]) for name in ("error_kind", "message", "public_url") if name in status),
    ]
    print(": ".join(parts), flush=True)


@asynccontextmanager
async def connected(parts: SplitResult, token: str) -> AsyncIterator[Client]:
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


def read_first_line(what: str, file: str | None) -> str:
    """Read the first line of a file, by default standard input. No error shows `file`: it may be a key, by mistake."""
    try:
        text = sys.stdin.read() if file is None else Path(file).read_text()
    except OSError as error:
        sys.exit(f"{what} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        sys.exit(f"{what} is not a text file")
    return text.strip().partition("\n")[0]


def read_url(text: str) -> SplitResult:
    """Parse the gateway's URL. An error does not show it, nor does `no gateway answers` below show its userinfo."""
    parts = urlsplit(text)
    with suppress(ValueError):  # from `port`
        if parts.scheme in {"ws", "wss"} and parts.hostname and parts.port != 0 and "@" not in parts.netloc:
            return parts
    sys.exit("URL is not the gateway's: write ws://HOST:PORT, or wss://HOST")


async def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    url, token = read_url(arguments.url), read_first_line("--token-file", arguments.token_file)
    if arguments.command == "key":
        arguments.argument = read_first_line("FILE", arguments.argument)
    problem: str | None = None
    try:
        async with connected(url, token) as client:
            try:
                await run_command(client, arguments.command, arguments.argument)
            except Refused as refusal:
                problem = str(refusal)
            except ConnectionClosed:
                problem = "the gateway has closed the connection"
    except* ConnectionRejected:
        problem = "the gateway does not let us in: is the token right?"
    except* (OSError, trio.TooSlowError, HandshakeError):
        problem = f"no gateway answers at {url.scheme}://{url.netloc}"
    if problem is not None:
        print(problem, file=sys.stderr)
    return 0 if problem is None else 1


async def run_command(client: Client, command: str, argument: str | None) -> None:
    match command:
        case "on" | "off":
            section = await client.update(enabled=command == "on")
        case "key":
            section = await client.update(key=argument)
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
    parser.add_argument("command", help=" ".join(COMMANDS), metavar="COMMAND")
    parser.add_argument("argument", nargs="?", help="FILE of `key`, STATE of `watch`")
    # Errors of argparse itself show what was given, which may be a key.
    arguments, surplus = parser.parse_known_args()
    if surplus:
        parser.error("there are too many arguments")
    if arguments.command not in COMMANDS:
        parser.error(f"COMMAND is one of {', '.join(COMMANDS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(trio.run(main, parse_arguments()))

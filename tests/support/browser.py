"""Headless Chromium for the tests of pages, driven over its DevTools protocol. Debian's package is `chromium`."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, final

import pytest
import trio
from rig import no_hang
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

__all__ = ["Browser", "Tab", "needs_axe", "needs_chromium", "open_browser"]

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE: Final = Path(__file__).parents[1] / "interop" / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS: Final = os.environ.get("SCREENSHOTS")
"""A folder for the screenshots of a test run; without it none are written."""

needs_chromium: Final = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")

needs_axe: Final = pytest.mark.skipif(
    not AXE.exists(), reason="axe-core is not installed: `make test` takes it from npm"
)

_KEYS: Final = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}


@final
class Tab:
    """A page in a window of its own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser: Final = browser
        self._session: Final = session

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        return await self._browser.call(method, params, self._session)

    async def go(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script} raised {json.dumps(answer['exceptionDetails'])[:2000]}")
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression in the page holds."""
        with no_hang():
            while not await self.run(f"Boolean({condition})"):
                await trio.sleep(0.02)

    async def press(self, key: str) -> None:
        """Press a key: Tab, Enter, or the space bar."""
        code, text = _KEYS[key]
        event = {"key": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def type(self, text: str) -> None:
        """Type where the focus is."""
        await self.call("Input.insertText", text=text)

    async def look(self, *, width: int = 1280, dark: bool = False) -> None:
        """Set the width of the window, and what the user prefers. Motion is reduced, so that screenshots are alike."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        shown = [{"name": name, "value": value} for name, value in features.items()]
        await self.call("Emulation.setEmulatedMedia", features=shown)

    async def screenshot(self, name: str) -> None:
        """Take a picture of the whole page, where the environment variable SCREENSHOTS names a folder."""
        if SCREENSHOTS is not None:
            picture = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
            await trio.Path(SCREENSHOTS, f"{name}.png").write_bytes(base64.b64decode(picture["data"]))

    async def audit(self) -> None:
        """Let axe-core, where it is installed, look for problems of accessibility, and see that the page fits."""
        assert await self.run("document.documentElement.scrollWidth <= innerWidth"), "it has to be scrolled sideways"
        if not AXE.exists():
            return
        if not await self.run("'axe' in window"):
            await self.run(AXE.read_text() + ";0")
        found = await self.run(
            "axe.run().then(({violations}) => violations.map("
            "({id, nodes}) => id + ': ' + nodes.map((node) => node.html + ' ' + node.failureSummary).join()))"
        )
        assert found == [], found


@final
class Browser:
    """A running Chromium.

    Attributes:
        console: what its pages have complained about: errors, and what a policy has blocked.
    """

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket: Final = websocket
        self._numbers: Final = itertools.count(1)
        self._answers: Final[dict[int, trio.MemorySendChannel[dict[str, Any]]]] = {}
        self.console: Final[list[str]] = []

    async def listen(self) -> None:
        try:
            while True:
                message = json.loads(await self._websocket.get_message())
                if "id" in message:
                    self._answers.pop(message["id"]).send_nowait(message)
                elif _is_complaint(message):
                    self.console.append(json.dumps(message["params"]))
        except ConnectionClosed:
            pass

    async def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = next(self._numbers)
        sender, receiver = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[number] = sender
        message = {"id": number, "method": method, "params": params}
        await self._websocket.send_message(json.dumps(message if session is None else message | {"sessionId": session}))
        with no_hang():
            answer = await receiver.receive()
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, *, private: bool = False) -> Tab:
        """A new tab; if `private`, without the cookies of the others."""
        context = (await self.call("Target.createBrowserContext", {})) if private else {}
        target = await self.call("Target.createTarget", {"url": "about:blank", **context})
        attached = await self.call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        tab = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        await tab.look()
        return tab


def _is_complaint(event: dict[str, Any]) -> bool:
    if event["method"] == "Log.entryAdded":
        return bool(event["params"]["entry"]["level"] != "verbose")
    return bool(event["method"] == "Runtime.exceptionThrown")


@asynccontextmanager
async def open_browser(profile: Path, names: Mapping[str, int] | None = None) -> AsyncIterator[Browser]:
    """Start Chromium.

    Args:
        profile: a folder for its files.
        names: where `host:port` is, as a port of 127.0.0.1. Nothing else but loopback is reached. Certificates are not
            checked: no test of a page is about them.
    """
    assert CHROMIUM is not None
    rules = [*(f"MAP {name} 127.0.0.1:{port}" for name, port in (names or {}).items()), "MAP * ~NOTFOUND"]
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--ignore-certificate-errors",
        "--remote-debugging-port=0", f"--user-data-dir={profile}",
        f"--host-resolver-rules={', '.join([*rules, 'EXCLUDE 127.0.0.1', 'EXCLUDE localhost'])}", "about:blank",
    ]  # fmt: skip
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(profile)}
    )
    try:
        port_file = profile / "DevToolsActivePort"
        with no_hang():
            while not (port_file.exists() and "\n" in port_file.read_text()):
                assert process.poll() is None, "Chromium has ended"
                await trio.sleep(0.05)
        port, _, path = port_file.read_text().partition("\n")
        url = f"ws://127.0.0.1:{port}{path.strip()}"
        async with open_websocket_url(url, max_message_size=1 << 28) as websocket, trio.open_nursery() as nursery:
            browser = Browser(websocket)
            nursery.start_soon(browser.listen)
            yield browser
            nursery.cancel_scope.cancel()
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()

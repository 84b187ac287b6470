"""How many lines others can make the logs hold."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
import trustme
from rig import no_hang, relay_rig, request

from pioneer_tunnel._model.errors import TunnelAuthError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.log_limiter import LINES_IN_FULL, LOG_INTERVAL, MOST_KINDS, LogLimiter
from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.visitor_tls import terminate_tls

LOG: Final = logging.getLogger("pioneer_tunnel.tests.limiter")


async def test_the_first_lines_are_written_in_full_and_then_one_a_minute_with_a_count(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = LogLimiter(LOG)
    for second in range(600):
        limiter.log("kind", f"line {second}")
        await trio.sleep(1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:LINES_IN_FULL] == [f"line {number}" for number in range(LINES_IN_FULL)]
    assert lines[LINES_IN_FULL] == "line 60 (55 more since the last such line)"
    assert lines[LINES_IN_FULL + 1] == "line 120 (59 more since the last such line)"
    assert len(lines) == LINES_IN_FULL + 9
    caplog.clear()
    await trio.sleep(LINES_IN_FULL * LOG_INTERVAL)
    for _ in range(20):
        limiter.log("kind", "again")
    assert len(caplog.records) == LINES_IN_FULL


async def test_kinds_and_logs_are_limited_apart_and_instances_together(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        LogLimiter(LOG).log("kind", "line")
        LogLimiter(LOG).log(("another", 1), "line")
        LogLimiter(logging.getLogger("pioneer_tunnel.tests.another")).log("kind", "line")
    assert len(caplog.records) == 3 * LINES_IN_FULL


async def test_what_is_not_logged_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(100):
        LogLimiter(LOG).log("kind", "not logged", level=logging.INFO)
    LogLimiter(LOG).log("kind", "logged")
    assert [record.getMessage() for record in caplog.records] == ["logged"]


async def test_a_traceback_is_limited_too(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        try:
            raise ValueError("what went wrong")
        except ValueError as error:
            LogLimiter(LOG).log("kind", "it failed", level=logging.ERROR, error=error)
    assert caplog.text.count("Traceback") == caplog.text.count("what went wrong\n") == LINES_IN_FULL


async def test_so_many_kinds_are_remembered_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    limiter = LogLimiter(LOG)

    def lines_after(kinds: int) -> int:
        for _ in range(LINES_IN_FULL):
            limiter.log("kind", "line")
        for number in range(kinds):
            limiter.log(number, "line")
        caplog.clear()
        limiter.log("kind", "line")
        return len(caplog.records)

    assert lines_after(MOST_KINDS - 1) == 0, "remembered"
    assert lines_after(MOST_KINDS) == 1, "forgotten"


# Where others decide


async def lines_of(caplog: pytest.LogCaptureFixture, text: str, act: Callable[[], Awaitable[object]]) -> None:
    """`act` 20 times, and see that the lines with `text` are few, however long that takes."""
    caplog.set_level(logging.INFO)
    start = trio.current_time()
    with no_hang():
        for _ in range(20):
            await act()
    lines = sum(text in record.getMessage() for record in caplog.records)
    assert LINES_IN_FULL <= lines <= LINES_IN_FULL + (trio.current_time() - start) // LOG_INTERVAL


@pytest.mark.parametrize("text", ["is connected", "has ended"])
async def test_a_gateway_that_comes_and_goes(text: str, caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig() as rig:

        async def come_and_go() -> None:
            async with rig.tunnel() as tunnel:
                await tunnel.wait_connected()
            while text == "has ended" and rig.relay._gateways._sessions:
                await trio.sleep(0.001)

        await lines_of(caplog, text, come_and_go)


async def test_gateways_that_replace_each_other(caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig() as rig, trio.open_nursery() as nursery:

        async def stay(*, task_status: trio.TaskStatus[None]) -> None:
            async with rig.tunnel() as tunnel:
                await tunnel.wait_connected()
                task_status.started()
                await trio.sleep_forever()

        await lines_of(caplog, "was ended", lambda: nursery.start(stay))
        nursery.cancel_scope.cancel()


async def test_gateways_that_are_rejected(caplog: pytest.LogCaptureFixture) -> None:
    numbers = iter(range(100))
    async with relay_rig() as rig:

        async def be_rejected() -> None:
            async with rig.tunnel(key=RelayKey(f"a key that the relay does not know {next(numbers)}")) as tunnel:
                with pytest.raises(TunnelAuthError):
                    await tunnel.accept()

        await lines_of(caplog, "was rejected", be_rejected)


async def test_visitors_whose_tls_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    issued = trustme.CA().issue_cert("site.test")
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")

    class Carried:
        """What speaks HTTP where TLS is expected."""

        usable = True
        said = request()

        def acknowledge(self) -> None: ...

        def reset(self) -> None: ...

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            said, self.said = self.said, b""
            return said

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await trio.lowlevel.checkpoint()

        async def wait_send_all_might_not_block(self) -> None: ...

        async def send_eof(self) -> None: ...

        async def aclose(self) -> None: ...

    async def handler(stream: TunnelStream) -> None:
        raise ssl.SSLError("no visitor gets here")

    serve = terminate_tls(handler, certificate)
    await lines_of(caplog, "it was turned away", lambda: serve(TunnelStream(Carried())))

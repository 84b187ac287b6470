"""The structured fields of log records: each event is documented, and hostile text stays on its line."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st
from rig import RelayRig, ask, connect, eventually, no_hang, relay_rig, request
from source_imports import PACKAGE

from pioneer_tunnel import RelayKey
from pioneer_tunnel._model.log_fields import LOG_FIELDS, about
from pioneer_tunnel._net.log_limiter import LogLimiter
from pioneer_tunnel.cli.standard_error import JsonFormatter

OPERATING: Final = (PACKAGE.parent / "docs" / "operating.md").read_text()
NOT_OURS: Final = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None)))


def events() -> Iterator[str]:
    """Each event that the package names: in a call of `about`, or of a function that passes it on."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                texts = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
                if name == "about":
                    yield from texts
                elif name in {"_log_limited", "_log"}:
                    yield from (text for text in texts if text.startswith("session_"))


def test_each_event_and_field_is_documented() -> None:
    table = OPERATING[OPERATING.index("| key | meaning |") : OPERATING.index("### Access log")]
    documented = {*re.findall("`([a-z_0-9]+)`", table)}
    found = {*events()}
    assert len(found) > 30
    assert found <= documented
    assert {*LOG_FIELDS} <= documented


def test_fields_do_not_clash_with_those_of_logging() -> None:
    assert NOT_OURS.isdisjoint(LOG_FIELDS)


@given(st.text())
def test_hostile_text_stays_on_its_line(text: str) -> None:
    record = logging.LogRecord("name", logging.INFO, "", 0, "text", None, None)
    vars(record).update(about("session_ended", tunnel="office", reason=text))
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["tunnel"] == "office"
    assert json.loads(line)["event"] == "session_ended"
    assert "session" not in json.loads(line)


async def test_what_a_limiter_leaves_out_is_a_field(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    limiter = LogLimiter(logging.getLogger("pioneer_tunnel.of_this_test"))
    for _ in range(9):
        limiter.log("kind", "text", about=about("unforeseen"))
    assert len(caplog.records) == 5
    assert not any(hasattr(record, "dropped") for record in caplog.records)
    await trio.sleep(61)
    limiter.log("kind", "text", about=about("unforeseen"))
    assert vars(caplog.records[-1])["dropped"] == 4


def records(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "event", None) == event]


async def test_a_session_in_the_log_of_a_relay(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with relay_rig() as rig:
        with no_hang():
            async with rig.tunnel() as tunnel:
                await tunnel.wait_connected()
                session = tunnel.stats().sessions[0].id
            await eventually(lambda: records(caplog, "session_ended"))
            await reject(rig, caplog)
    (connected,), (ended,) = records(caplog, "session_connected"), records(caplog, "session_ended")
    for record in (connected, ended):
        assert vars(record)["tunnel"] == "office"
        assert vars(record)["session"] == session
        assert record.levelno == logging.INFO
    assert vars(connected)["peer"].startswith("127.0.0.1:")
    assert vars(ended)["reason"]
    (rejected,) = records(caplog, "gateway_rejected")
    assert rejected.levelno == logging.WARNING
    assert vars(rejected)["reason"] == "auth_failed"
    assert "of-a-stranger" not in caplog.text
    assert all("of-a-stranger" not in str(vars(record)) for record in caplog.records)


async def reject(rig: RelayRig, caplog: pytest.LogCaptureFixture) -> None:
    async with rig.tunnel(key=RelayKey("ptk1_the-key-of-a-stranger-0123456789abcdef")):
        await eventually(lambda: records(caplog, "gateway_rejected"))


async def test_a_refused_connection_in_the_log_of_a_relay(caplog: pytest.LogCaptureFixture) -> None:
    limits = {"connections_per_address": 1, "exempt": []}
    async with relay_rig(limits=limits) as rig:
        with no_hang():
            async with await rig.visit() as visitor:
                with suppress(OSError):  # it may be reset before it is seen as open
                    await trio.aclose_forcefully(await connect(rig.addresses.ingress))
                await eventually(lambda: records(caplog, "connection_refused"))
                await ask(visitor, request())
        assert rig.relay.stats().refusals_total["connections_per_address"] == 1
    (refused,) = records(caplog, "connection_refused")
    assert vars(refused)["reason"] == "connections_per_address"
    assert vars(refused)["peer"].startswith("127.0.0.1:")

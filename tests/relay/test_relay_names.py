"""Names that gateways create below a wildcard: each stays with its key for ever."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from rig import KEY, RelayRig, ask, eventually, no_hang, read_all, relay_rig, request, tunnel_entry

from pioneer_tunnel import RelayKey, Services
from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._storage import files
from pioneer_tunnel.relay import RelayConfig, TunnelEntry
from pioneer_tunnel.relay.names import NameBook, why_no_label
from pioneer_tunnel.relay.sharing import Sharing
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.tunnel import Tunnel

OTHER: Final = RelayKey("ptk1_the-key-of-another-box-0123456789")
NEXT: Final = RelayKey("ptk1_the-next-key-of-the-box-0123456789")
DOMAIN: Final = "box.test"


def box(key: RelayKey = KEY, **changes: Any) -> dict[str, Any]:
    fields = {
        "url": f"http://*.{DOMAIN}",
        "key": str(key.identity().public_key),
        "id": f"box of {key.identity().key_id}",
    }
    return tunnel_entry(**(fields | changes))


def entry_of(*keys: RelayKey) -> TunnelEntry:
    return TunnelEntry(**box(key=keys[0]) | {"key": None, "keys": [str(key.identity().public_key) for key in keys]})


async def say_service(stream: TunnelStream) -> None:
    async with stream:
        await read_all(stream)
        body = repr(stream.service).encode()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@asynccontextmanager
async def gateway(rig: RelayRig, *names: str, key: RelayKey = KEY) -> AsyncIterator[tuple[Tunnel, Services]]:
    services = Services(dict.fromkeys(names, "127.0.0.1:1"))
    async with rig.tunnel(key=key, services=services) as tunnel, trio.open_nursery() as nursery:
        with no_hang():
            await tunnel.wait_connected()
        nursery.start_soon(accept_visitors, tunnel, say_service, nursery)
        yield tunnel, services
        nursery.cancel_scope.cancel()


async def status_of(rig: RelayRig, name: str) -> bytes:
    with no_hang():
        async with await rig.visit() as visitor:
            answer = await ask(visitor, request("Connection: close", host=f"{name}.{DOMAIN}"))
    return b"200 " + answer.rpartition(b"\r\n")[2] if answer.startswith(b"HTTP/1.1 200 ") else answer[9:12]


# Through a relay


async def test_a_gateway_creates_names_while_it_runs(tmp_path: Path) -> None:
    async with (
        relay_rig(tunnels=[box()], names_file=tmp_path / "names.json") as rig,
        gateway(rig, "grafana") as (tunnel, services),
    ):
        assert tunnel.status.services == {"grafana": f"http://grafana.{DOMAIN}"}
        assert tunnel.public_url == f"http://*.{DOMAIN}"
        assert await status_of(rig, "grafana") == b"200 'grafana'"
        assert await status_of(rig, "wiki") == b"404"
        services["wiki"] = "127.0.0.1:2"
        await eventually(
            lambda: tunnel.status.services == {name: f"http://{name}.{DOMAIN}" for name in ("grafana", "wiki")}
        )
        assert await status_of(rig, "wiki") == b"200 'wiki'"
        del services["grafana"]
        await eventually(lambda: "grafana" not in (tunnel.status.services or ()))
        assert await status_of(rig, "grafana") == b"503"
        assert await status_of(rig, "deep.wiki") == b"404"


async def test_a_freed_name_never_passes_to_another_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "names.json"
    async with relay_rig(tunnels=[box(), box(OTHER)], names_file=file) as rig:
        async with gateway(rig, "grafana"), gateway(rig, "grafana", "mine", key=OTHER) as (other, _):
            assert set(other.status.services or ()) == {"mine"}
            assert "sends no visitors of the service 'grafana': another key has it" in caplog.text
            assert await status_of(rig, "grafana") == b"200 'grafana'"
        await eventually(lambda: len(json.loads(file.read_text())["names"]) == 2)
    # Its gateway is gone, its entry too, and the relay was restarted.
    async with (
        relay_rig(tunnels=[box(OTHER)], names_file=file) as rig,
        gateway(rig, "grafana", "mine", key=OTHER) as (other, _),
    ):
        assert set(other.status.services or ()) == {"mine"}
        assert await status_of(rig, "grafana") == b"404"
        await rig.apply(tunnels=[box(OTHER), box()])
        async with gateway(rig, "grafana") as (tunnel, _):
            assert set(tunnel.status.services or ()) == {"grafana"}
            assert await status_of(rig, "grafana") == b"200 'grafana'"


async def test_names_that_the_operator_gave_are_not_created(caplog: pytest.LogCaptureFixture) -> None:
    tunnels = [box(), tunnel_entry(id="shop", url=f"http://shop.{DOMAIN}", key=str(OTHER.identity().public_key))]
    async with (
        relay_rig(tunnels=tunnels, names_file="/nonexistent/names.json", reserved_names=["root"]) as rig,
        gateway(rig, "shop", "root", "relay", "a_b", "xn--a", "free") as (tunnel, _),
    ):
        assert not tunnel.status.services
        assert await status_of(rig, "shop") == b"503"  # its own gateway is not connected
        assert tunnel.status.state == "connected"
        for why in (
            "another tunnel has it",
            "has reserved it",
            "lower-case letters",
            "not a valid one",
            "cannot store",
        ):
            assert why in caplog.text
        assert "'relay': the relay's operator has reserved it" in caplog.text


# The book


@pytest.mark.parametrize("label", ["a", "grafana", "a-b", "0", "a" * 63, "xn--bcher-kva"])
def test_a_label_is_a_label(label: str) -> None:
    assert why_no_label(label) is None


@pytest.mark.parametrize(
    "label", ["", "a.b", "a_b", "-a", "a-", "A", "a" * 64, "xn--a", "xn--grafana-", "ab--cd", "b\u00fccher"]
)
def test_what_is_no_label_is_refused(label: str) -> None:
    assert why_no_label(label)


async def test_a_name_stays_with_a_tunnel_that_changes_its_key(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    book = NameBook(path)
    assert await book.claim(entry_of(KEY), "grafana", DOMAIN) is None
    assert await book.claim(entry_of(NEXT), "grafana", DOMAIN) == "another key has it"
    assert await book.claim(entry_of(KEY, NEXT), "grafana", DOMAIN) is None
    again = NameBook(path)
    assert again.keys_of(f"grafana.{DOMAIN}") == {KEY.identity().key_id, NEXT.identity().key_id}
    assert await again.claim(entry_of(NEXT), "grafana", DOMAIN) is None
    assert await again.claim(entry_of(OTHER), "grafana", DOMAIN) == "another key has it"


async def test_a_tunnel_cannot_claim_all_names() -> None:
    book = NameBook(None)
    for number in range(64):
        assert await book.claim(entry_of(KEY), f"n{number}", DOMAIN) is None
    assert "64 names already" in (await book.claim(entry_of(KEY), "one-more", DOMAIN) or "")
    assert await book.claim(entry_of(KEY), "n3", DOMAIN) is None
    assert await book.claim(entry_of(OTHER), "one-more", DOMAIN) is None


async def test_two_claims_at_once_have_one_winner(tmp_path: Path) -> None:
    book = NameBook(tmp_path / "names.json")
    answers: list[str | None] = []

    async def claim(key: RelayKey) -> None:
        answers.append(await book.claim(entry_of(key), "grafana", DOMAIN))

    async with trio.open_nursery() as nursery:
        for key in (KEY, OTHER):
            nursery.start_soon(claim, key)
    assert sorted(answers, key=str) == [None, "another key has it"]


async def test_of_two_processes_that_claim_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a relay hands over to its successor. Each is in the middle of its claim when the other one begins."""
    replace = files.replace

    def replace_slowly(path: Path, content: bytes) -> bool:
        time.sleep(0.1)
        return replace(path, content)

    monkeypatch.setattr(files, "replace", replace_slowly)
    path = tmp_path / "names.json"
    answers: list[str | None] = []

    async def claim(key: RelayKey, name: str) -> None:
        answers.append(await NameBook(path).claim(entry_of(key), name, DOMAIN))

    async with trio.open_nursery() as nursery:
        for key, name in ((KEY, "grafana"), (OTHER, "grafana"), (NEXT, "wiki")):
            nursery.start_soon(claim, key, name)
    assert sorted(answers, key=str) == [None, None, "another key has it"]
    assert json.loads(path.read_text())["names"].keys() == {f"grafana.{DOMAIN}", f"wiki.{DOMAIN}"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"names":[]}', '{"names":{"a":1}}', "\u00ff"])
def test_a_damaged_file_gives_no_name_away(tmp_path: Path, content: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(StorageError, match="damaged"):
        NameBook(path)


# The configuration


def problems(entry: dict[str, Any], **changes: Any) -> list[str]:
    fields: dict[str, Any] = dict.fromkeys(["control_addr", "ingress_addr"], "127.0.0.1:0")
    fields |= {"id": "r", "public_names": ["r"], "names_file": "names.json"}
    with pytest.raises(InvalidSettingsError) as error:
        RelayConfig.from_table(fields | changes | {"tunnels": [entry]})
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (box(bind_addr="127.0.0.1:1"), "a wildcard stands beside a bind_addr"),
        (box(url="http://*.10.0.0.1"), "wildcard for the names of no domain"),
        (box(url="http://*.local"), "wildcard for the names of no domain"),
        (box(url="http://a.*.box.test"), "neither a host name nor"),
        (
            box(url=None, services=[{"name": "web", "url": "http://*.box.test"}]),
            "belongs to a service with the name '\\*'",
        ),
        (box(url=None, services=[{"name": "*", "url": "http://box.test"}]), "its url has to be a wildcard"),
    ],
)
def test_what_is_wrong_with_a_wildcard_is_named(entry: dict[str, Any], told: str) -> None:
    (problem,) = problems(entry)
    assert told.replace("\\", "") in problem


def test_a_wildcard_needs_a_file() -> None:
    (problem,) = problems(box(), names_file=None)
    assert problem.startswith("relay.names_file")
    assert "each stays with its key for ever" in problem


# Several processes


async def test_a_name_is_known_to_all_processes_when_its_gateway_learns_of_it(tmp_path: Path) -> None:
    one, other = (NameBook(tmp_path / "names.json") for _ in range(2))
    claimed: list[str] = []

    async def ignore(_message: Any) -> None:
        """The other one announces nothing."""

    sharing_of_other = Sharing(ignore, other, None)

    async def announce(message: Any) -> None:
        assert one.keys_of(f"wiki.{DOMAIN}"), "the file has it"
        await sharing_of_other.hear(message)

    Sharing(announce, one, None)
    other.on_claim = lambda: claimed.append("wiki")
    assert await one.claim(entry_of(KEY), "wiki", DOMAIN) is None
    assert other.keys_of(f"wiki.{DOMAIN}") == one.keys_of(f"wiki.{DOMAIN}") == {KEY.identity().key_id}
    assert claimed == ["wiki"], "it may need a certificate"
    assert await other.claim(entry_of(OTHER), "wiki", DOMAIN) == "another key has it"

"""`Services`: the services of a gateway, which change while a tunnel is up."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import trio
import trio.testing
from rig import eventually, in_background

from pioneer_tunnel import Services
from pioneer_tunnel._model.addresses import Address, UnixAddress
from pioneer_tunnel._wire.messages import Message
from pioneer_tunnel._wire.services import SERVICES, serves_text
from pioneer_tunnel.transports.service_offer import ServiceOffer


def test_it_is_a_mapping_of_addresses() -> None:
    services = Services({"web": "127.0.0.1:8000", "": Address("127.0.0.1", 1)})
    services["db"] = "unix:/run/db"
    assert services == {
        "web": Address("127.0.0.1", 8000),
        "": Address("127.0.0.1", 1),
        "db": UnixAddress("/run/db"),
    }
    assert [*services] == ["web", "", "db"]
    del services["web"]
    assert [*services] == ["", "db"]
    assert repr(services) == "Services({'': '127.0.0.1:1', 'db': 'unix:/run/db'})"
    with pytest.raises(KeyError):
        del services["web"]


@pytest.mark.parametrize("name", ["Web", "a b", "-a", "a" * 64, "\u00e4"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    services = Services()
    with pytest.raises(ValueError, match="1 to 63 lower-case letters"):
        services[name] = "127.0.0.1:1"
    with pytest.raises(ValueError, match="has no port"):
        services["web"] = "nonsense"
    assert not services


def test_there_are_64_at_most() -> None:
    services = Services({f"s{number}": "127.0.0.1:1" for number in range(64)})
    services["s1"] = "127.0.0.1:2"
    with pytest.raises(ValueError, match="64 services"):
        services["one-more"] = "127.0.0.1:1"


async def test_a_change_of_names_is_seen_and_a_change_of_an_address_is_none() -> None:
    services = Services({"web": "127.0.0.1:1"})
    seen: list[frozenset[str]] = []

    async def watch() -> None:
        names = services.names
        while True:
            names = await services.wait_changed(names)
            seen.append(names)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        services["web"] = "127.0.0.1:2"
        await trio.testing.wait_all_tasks_blocked()
        assert not seen
        services["ssh"] = "127.0.0.1:22"
        await trio.testing.wait_all_tasks_blocked()
        del services["web"], services["ssh"]  # one look at both changes is enough
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [{"web", "ssh"}, frozenset()]
        nursery.cancel_scope.cancel()
    services["db"] = "127.0.0.1:3"  # nobody watches


async def test_another_thread_may_change_it() -> None:
    services = Services()
    change = partial(services.update, {"web": "127.0.0.1:1"})
    threading.Timer(0.05, change).start()
    with trio.fail_after(60):
        assert await services.wait_changed(frozenset()) == {"web"}


async def test_the_relay_is_told_of_a_change_that_a_failed_handshake_has_named_before() -> None:
    services = Services({"web": "127.0.0.1:1"})
    offer = ServiceOffer(services)
    choose = offer.choices[SERVICES]
    choose(Message("", {}))
    sent: list[str] = []
    paused = trio.Event()

    async def send(text: str) -> None:
        await paused.wait()
        sent.append(text)

    async with in_background(lambda: offer.keep_told(send, lambda: None)):
        services["wiki"] = "127.0.0.1:2"
        await trio.testing.wait_all_tasks_blocked()
        services["db"] = "127.0.0.1:3"
        choose(Message("", {}))  # of a handshake that never ends
        paused.set()
        await eventually(lambda: len(sent) == 2)
        assert sent == [serves_text({"web", "wiki"}), serves_text({"web", "wiki", "db"})]

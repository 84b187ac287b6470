"""`_net.ways`: what is a change of the way to the relay, and what is not."""

from __future__ import annotations

from pioneer_tunnel._net.ways import Way, Ways

HOME = Way(interface=2, gateway=b"gw", source=b"home")
OFFICE = Way(interface=2, gateway=b"gw", source=b"office")
MOBILE = Way(interface=3, source=b"mobile")


def at_home() -> Ways:
    ways = Ways()
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None}), "the first look is no change"
    return ways


def test_the_same_way_is_no_change() -> None:
    ways = at_home()
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None})


def test_another_address_interface_or_gateway_is_a_change() -> None:
    ways = at_home()
    assert ways.look({"192.0.2.7": OFFICE, "2001:db8::1": None})
    assert ways.look({"192.0.2.7": MOBILE, "2001:db8::1": None})
    assert not ways.look({"192.0.2.7": MOBILE, "2001:db8::1": None})
    assert ways.look({"192.0.2.7": MOBILE, "2001:db8::1": MOBILE}), "IPv6 came"


def test_a_destination_that_was_not_asked_for_before_is_no_change() -> None:
    ways = Ways()
    ways.look({"203.0.113.1": HOME})
    assert not ways.look({"192.0.2.7": HOME, "203.0.113.1": HOME})
    assert not ways.look({"203.0.113.1": HOME})


def test_without_a_way_nothing_is_reported_until_there_is_one() -> None:
    """Not even that it is lost. The same way again is a change: in between it may have led elsewhere."""
    ways = at_home()
    assert not ways.look({"192.0.2.7": None, "2001:db8::1": None})
    assert not ways.look({"192.0.2.7": None, "2001:db8::1": None})
    assert ways.look({"192.0.2.7": HOME, "2001:db8::1": None})
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None})


def test_a_loss_of_one_of_several_is_not_reported() -> None:
    """The relay cannot be reached now. The way to another destination is what it was."""
    ways = Ways()
    ways.look({"192.0.2.7": HOME, "2001:db8::1": MOBILE})
    assert not ways.look({"192.0.2.7": None, "2001:db8::1": MOBILE})
    assert ways.look({"192.0.2.7": HOME, "2001:db8::1": MOBILE})
    assert not ways.look({"192.0.2.7": None, "2001:db8::1": MOBILE})
    assert ways.look({"192.0.2.7": None, "2001:db8::1": OFFICE}), "but that may help"


def test_a_start_without_a_network_waits_for_one() -> None:
    ways = Ways()
    assert not ways.look({"203.0.113.1": None})
    assert ways.look({"203.0.113.1": HOME})


def test_an_address_that_was_lost_and_is_back_is_a_change() -> None:
    ways = at_home()
    ways.note(2, lost=True)
    assert ways.look({"192.0.2.7": HOME, "2001:db8::1": None})
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None})


def test_a_loss_of_ipv4_does_not_touch_ipv6() -> None:
    ways = Ways()
    ways.look({"192.0.2.7": HOME, "2001:db8::1": HOME})
    ways.note(2, lost=True, ipv6=False)
    assert not ways.look({"192.0.2.7": None, "2001:db8::1": HOME})
    assert ways.look({"192.0.2.7": HOME, "2001:db8::1": HOME})


def test_what_happens_to_other_interfaces_does_not_matter() -> None:
    ways = at_home()
    for interface in range(10, 30):
        ways.note(interface, running=True)
        ways.note(interface, lost=True)
        ways.note(interface, running=False, lost=True)
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None})


def test_a_cable_that_is_pulled_and_put_back() -> None:
    """The kernel keeps the address and the route."""
    ways = at_home()
    ways.note(2, running=False, lost=True)
    assert not ways.look({"192.0.2.7": HOME, "2001:db8::1": None})
    ways.note(2, running=True)
    assert ways.look({"192.0.2.7": HOME, "2001:db8::1": None})

"""`fleet/passed_message.py`: the bytes beside the descriptors of connections that are passed on."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.relay.fleet.passed_message import FORMAT, encode_passed, parse_passed
from pioneer_tunnel.relay.visitors.passing import Passed, Stage


def test_the_format_is_that_of_its_number() -> None:
    """If this fails, change the number with the bytes. Otherwise visitors are lost while workers are replaced."""
    passed = Passed(
        9, Stage.BOUND, Address("2001:db8::1", 4711), Address("192.0.2.2", 443), None, "office", "web", b"x"
    )
    assert encode_passed(passed).hex() == (
        "0202126701bb002000000001323030313a6462383a3a31003139322e302e322e32006f666669636500776562"
    )
    assert FORMAT == 2


ADDRESSES: Final = st.none() | st.builds(Address, st.ip_addresses().map(str), st.integers(min_value=0, max_value=65535))

CONNECTIONS: Final = st.builds(
    Passed,
    st.integers(min_value=0, max_value=9),
    st.sampled_from(Stage),
    ADDRESSES,
    ADDRESSES,
    st.sampled_from([False, True, None]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=128),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=64),
    st.binary(max_size=200),
)


@fuzzed()
@given(st.lists(CONNECTIONS, max_size=4), st.integers(min_value=0, max_value=4))
def test_a_message_is_read_as_it_was_written(together: list[Passed], came: int) -> None:
    """As far as descriptors came with it."""
    message = b"".join(encode_passed(passed) + passed.received for passed in together)
    descriptors = [passed.descriptor for passed in together][:came]
    assert parse_passed(message, descriptors) == (together[:came], came >= len(together))


@fuzzed()
@given(st.binary(max_size=64), st.lists(st.just(7), max_size=3))
def test_any_other_message_is_refused(message: bytes, descriptors: list[int]) -> None:
    with suppress(ValueError):
        parse_passed(message, descriptors)

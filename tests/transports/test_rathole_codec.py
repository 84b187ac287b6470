"""The Pioneer Relay / rathole protocol, byte by byte: the vectors, every cut, and everything that is not it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from yamux_rig import cut, one_by_one

from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.transports.rathole.codec import (
    Ack,
    Challenge,
    ChannelKind,
    ControlChannel,
    ControlCommand,
    ControlEvent,
    DataCommand,
    Hello,
    OtherVersionError,
    decode_data_command,
    encode_ack,
    encode_command,
)
from pioneer_tunnel.transports.rathole.key_mode import KeyMode

VECTORS: list[dict[str, str]] = json.loads((Path(__file__).parents[1] / "vectors" / "pioneer-relay.json").read_text())
ID, NONCE, PROOF = b"i" * 32, b"n" * 32, b"p" * 32
RELAY_HELLO = Hello(ChannelKind.CONTROL, NONCE).encode()
COMMANDS = encode_command(ControlCommand.CREATE_DATA_CHANNEL) * 2 + encode_command(ControlCommand.HEARTBEAT)


def conversation(channel: ControlChannel, pieces: Iterator[bytes]) -> list[ControlEvent]:
    """Feed `pieces`, and prove when asked to."""
    events: list[ControlEvent] = []
    for piece in pieces:
        for event in channel.receive(piece):
            events.append(event)
            if isinstance(event, Challenge):
                channel.prove(PROOF)
    return events


def opened() -> ControlChannel:
    channel = ControlChannel(ID)
    assert conversation(channel, iter([RELAY_HELLO, encode_ack(Ack.OK)])) == [Challenge(NONCE), Ack.OK]
    return channel


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['mode']}-{vector['service']}")
def test_vectors(vector: dict[str, str]) -> None:
    mode, key = KeyMode(vector["mode"]), RelayKey(vector["key"])
    nonce = bytes.fromhex(vector["nonce"])
    channel = ControlChannel(mode.id(key, vector["service"]))
    assert channel.hello.hex() == vector["control_hello"]
    assert Hello(ChannelKind.CONTROL, nonce).encode().hex() == vector["relay_hello"]
    assert channel.receive(bytes.fromhex(vector["relay_hello"])) == [Challenge(nonce)]
    proof = mode.proof(key, nonce)
    assert channel.prove(proof).hex() == vector["proof"]
    assert Hello(ChannelKind.DATA, proof).encode().hex() == vector["data_hello"]
    assert Hello.decode(bytes.fromhex(vector["data_hello"])) == Hello(ChannelKind.DATA, proof)


def test_the_modes_are_those_of_the_vectors() -> None:
    assert {vector["mode"] for vector in VECTORS} == set(KeyMode)
    assert KeyMode("rathole").by_name
    assert not KeyMode("token_routing").by_name


@fuzzed()
@given(st.data())
def test_a_conversation_cut_anywhere_says_the_same(data: st.DataObject) -> None:
    # The relay waits for the proof before its ack, so that no piece holds both; after the ack it need not wait.
    later = encode_ack(Ack.OK) + COMMANDS
    pieces = []
    for message in (RELAY_HELLO, later):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(message)))) | {0, len(message)})
        pieces += [message[start:end] for start, end in itertools.pairwise(cuts)]
    assert conversation(ControlChannel(ID), iter(pieces)) == [
        Challenge(NONCE),
        Ack.OK,
        ControlCommand.CREATE_DATA_CHANNEL,
        ControlCommand.CREATE_DATA_CHANNEL,
        ControlCommand.HEARTBEAT,
    ]


@pytest.mark.parametrize("ack", [Ack.SERVICE_NOT_EXIST, Ack.AUTH_FAILED])
def test_a_refusal_ends_the_channel(ack: Ack) -> None:
    channel = ControlChannel(ID)
    assert conversation(channel, iter([RELAY_HELLO, encode_ack(ack) + b"whatever"])) == [Challenge(NONCE), ack]
    assert channel.receive(b"more") == []


def test_an_unknown_service_is_told_before_the_proof() -> None:
    channel = ControlChannel(ID)
    answer = RELAY_HELLO + encode_ack(Ack.SERVICE_NOT_EXIST)
    assert channel.receive(answer) == [Challenge(NONCE), Ack.SERVICE_NOT_EXIST]


@pytest.mark.parametrize("ack", [Ack.OK, Ack.AUTH_FAILED])
def test_a_relay_that_judges_a_proof_that_it_has_not_seen_is_none(ack: Ack) -> None:
    with pytest.raises(RemoteProtocolError, match="before it had our proof"):
        ControlChannel(ID).receive(RELAY_HELLO + encode_ack(ack))


@pytest.mark.parametrize(
    ("junk", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "TLS"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "53 53 48"),
        (b"\x02\0\0\0\x01" + NONCE, "02 00 00"),
        (b"\0\0\0\x01\x01" + NONCE, "00 00 00 01"),
        (Hello(ChannelKind.DATA, NONCE).encode(), "data channel"),
    ],
)
def test_junk_for_a_hello(junk: bytes, says: str) -> None:
    channel = ControlChannel(ID)
    with pytest.raises(RemoteProtocolError, match=says):
        channel.receive(junk)
    assert channel.receive(RELAY_HELLO) == []


words = st.sampled_from([RELAY_HELLO, *map(encode_ack, Ack), COMMANDS, b"\x07\0\0\0", RELAY_HELLO[:5]])


@fuzzed()
@given(st.lists(words | st.binary(max_size=40), max_size=8).map(b"".join), st.lists(st.integers(0, 400), max_size=6))
def test_whatever_a_relay_says_it_says_the_same_in_any_pieces(data: bytes, places: list[int]) -> None:
    """And only a `RemoteProtocolError` comes out, after which it has no more to say."""

    def heard(pieces: list[bytes]) -> tuple[list[ControlEvent], bool]:
        channel, events = ControlChannel(ID), list[ControlEvent]()
        try:
            for piece in pieces:
                said = channel.receive(piece)
                events += said
                if said and isinstance(said[-1], Challenge):
                    channel.prove(PROOF)
        except RemoteProtocolError:
            assert channel.receive(COMMANDS) == []
            return events, False
        return events, True

    events, good = heard(one_by_one(data))
    other_events, other_good = heard(cut(data, places))
    # What comes before the proof can be sent is refused the sooner, the larger the pieces.
    if good and other_good:
        assert events == other_events


@fuzzed()
@given(st.binary(min_size=4))
def test_any_bytes_are_a_hello_or_refused_or_awaited(data: bytes) -> None:
    try:
        hello = Hello.decode(data)
    except RemoteProtocolError:
        return
    assert (hello is None) == (len(data) < 37)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_an_error_of_its_own(version: int) -> None:
    with pytest.raises(OtherVersionError, match=f"version {version} of") as raised:
        ControlChannel(ID).receive(b"\0\0\0\0" + bytes([version]))
    assert raised.value.version == version


@pytest.mark.parametrize("number", [3, 255, 2**32 - 1])
def test_an_unknown_ack(number: int) -> None:
    channel = ControlChannel(ID)
    with pytest.raises(RemoteProtocolError, match=str(number)):
        conversation(channel, iter([RELAY_HELLO, number.to_bytes(4, "little")]))


@pytest.mark.parametrize("number", [2, 2**24, 2**32 - 1])
def test_an_unknown_command(number: int) -> None:
    channel = opened()
    with pytest.raises(RemoteProtocolError, match=str(number)):
        channel.receive(COMMANDS + number.to_bytes(4, "little"))
    assert channel.receive(COMMANDS) == []


def test_data_commands() -> None:
    assert decode_data_command(b"\0\0\0\0") is DataCommand.START_FORWARD_TCP
    assert decode_data_command(b"\1\0\0\0") is DataCommand.START_FORWARD_UDP
    with pytest.raises(RemoteProtocolError, match="7"):
        decode_data_command(b"\7\0\0\0")


def test_what_the_channel_waits_for_is_told() -> None:
    channel = ControlChannel(ID)
    told: list[Any] = [channel.waits_for]
    channel.receive(RELAY_HELLO)
    told.append(channel.waits_for)
    channel.prove(PROOF)
    told.append(channel.waits_for)
    channel.receive(encode_ack(Ack.OK))
    told.append(channel.waits_for)
    assert told == ["its hello", "our proof", "its word on our key", "a command"]


def test_our_own_mistakes() -> None:
    with pytest.raises(LocalProtocolError):
        ControlChannel(b"short")
    with pytest.raises(LocalProtocolError):
        ControlChannel(ID).prove(PROOF)
    channel = opened()
    with pytest.raises(LocalProtocolError):
        channel.prove(PROOF)


def test_a_hello_shows_no_digest() -> None:
    assert "696969" not in repr(Hello(ChannelKind.CONTROL, ID))
    assert repr(ID) not in repr(Hello(ChannelKind.CONTROL, ID))

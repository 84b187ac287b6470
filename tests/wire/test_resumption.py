"""`resumption`: the bytes of the vectors, and that only the two ends of a session can resume it."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import pickle
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, strategies as st

from pioneer_tunnel._model.errors import RelayConnectError, RemoteProtocolError
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._wire.handshake import GatewayHandshake, RelayHandshake, Welcome
from pioneer_tunnel._wire.messages import Choose, Message
from pioneer_tunnel._wire.resumption import (
    RESUME,
    Confirmation,
    Counters,
    GatewayResumption,
    RelayResumption,
    ResumeChoice,
    SessionSecret,
    Suspended,
    received_in,
    received_text,
)

VECTORS: Final[list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "native-resume.json").read_text(encoding="utf-8")
)
SESSION: Final = "a-session"
WINDOW: Final = 1024 * 1024


def private(hexadecimal: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(hexadecimal))


def as_said(fields: dict[str, Any] | None) -> Message:
    """What arrives at the other end."""
    return Message(RESUME, json.loads(json.dumps(fields)))


def relay_side(**changes: Any) -> RelayResumption:
    return RelayResumption(**({"timeout": 60, "window": WINDOW} | changes))


def gateway_side(**changes: Any) -> GatewayResumption:
    return GatewayResumption(**({"timeout": 60, "window": WINDOW} | changes))


def suspended(secret: SessionSecret, *, session: str = SESSION, counters: Counters | None = None) -> Suspended:
    return Suspended(session=session, secret=secret, counters=lambda: counters or Counters(7, 9))


def chosen(gateway: GatewayResumption, relay: RelayResumption) -> ResumeChoice:
    choice = relay.read(as_said(gateway.choose(as_said(relay.offer))))
    assert choice is not None
    return choice


def new_session(relay_timeout: float = 60, gateway_timeout: float = 60) -> tuple[SessionSecret, Confirmation]:
    """The secret as the relay has it, and what the gateway has."""
    relay, gateway = relay_side(timeout=relay_timeout), gateway_side(timeout=gateway_timeout)
    choice = chosen(gateway, relay)
    assert choice.session is None
    secret = relay.new_secret(choice)
    confirmation = gateway.confirmed(SESSION, as_said(relay.confirm(choice, secret, SESSION)))
    assert confirmation is not None
    return secret, confirmation


def same(one: SessionSecret, other: SessionSecret) -> bool:
    return one.tag(b"label", b"field") == other.tag(b"label", b"field")


# The vectors


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_what_both_ends_say_is_that_of_the_vector(number: int) -> None:
    vector = VECTORS[number]
    said = vector["chosen"]
    secret = SessionSecret(bytes.fromhex(vector["secret"]))
    resumes = "session" in said
    relay = relay_side(window=vector["offered"]["window_bytes"], key=private(vector["relay_private"]))
    gateway = gateway_side(
        timeout=said["timeout_ms"] / 1000,
        window=said["window_bytes"],
        suspended=suspended(secret, session=vector["session"], counters=Counters(said["sent"], said["received"]))
        if resumes
        else None,
        key=private(vector["gateway_private"]),
    )
    assert relay.offer == vector["offered"]
    assert gateway.choose(as_said(relay.offer)) == said
    choice = relay.read(as_said(said))
    assert choice is not None
    if resumes:
        assert relay.is_proved(choice, secret)
        counters = Counters(vector["confirmed"]["sent"], vector["confirmed"]["received"])
        confirmed = relay.confirm(choice, secret, vector["session"], counters)
    else:
        assert same(relay.new_secret(choice), secret)
        confirmed = relay.confirm(choice, secret, vector["session"])
    assert confirmed == vector["confirmed"]
    confirmation = gateway.confirmed(vector["session"], as_said(confirmed))
    assert confirmation is not None
    assert same(confirmation.secret, secret)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_a_tag_is_what_the_documentation_says(vector: dict[str, Any]) -> None:
    """Computed here once more, from the text of docs/protocol.md."""
    offered, said, confirmed = vector["offered"], vector["chosen"], vector["confirmed"]

    def tag(label: str, *numbers: int) -> str:
        keys = [base64.b64decode(offered["key"]), base64.b64decode(said["key"])]
        counters = b"".join(number.to_bytes(8, "big") for number in numbers)
        data = label.encode() + b"\0"
        for field in [*keys, vector["session"].encode(), counters]:
            data += len(field).to_bytes(4, "big") + field
        return base64.b64encode(hmac.digest(bytes.fromhex(vector["secret"]), data, hashlib.sha256)).decode()

    gateway = [said.get("sent", 0), said.get("received", 0)]
    relay = [confirmed.get("sent", 0), confirmed.get("received", 0)]
    if "session" in said:
        assert said["tag"] == tag("pioneer-tunnel/v1 gateway resume", *gateway)
    assert confirmed["tag"] == tag("pioneer-tunnel/v1 relay resume", *gateway, *relay)


# Who can resume


def test_both_ends_get_the_same_secret_and_the_smaller_timeout() -> None:
    for timeouts, smaller in (((60, 20), 20), ((5, 20), 5)):
        secret, confirmation = new_session(*timeouts)
        assert same(secret, confirmation.secret)
        assert (confirmation.timeout, confirmation.counters) == (smaller, None)


def test_no_two_sessions_have_the_same_secret() -> None:
    assert not same(new_session()[0], new_session()[0])


def test_a_session_is_resumed() -> None:
    secret, known = new_session()
    relay, gateway = relay_side(), gateway_side(suspended=suspended(known.secret))
    choice = chosen(gateway, relay)
    assert (choice.session, choice.counters) == (SESSION, Counters(7, 9))
    assert relay.is_proved(choice, secret)
    confirmation = gateway.confirmed(SESSION, as_said(relay.confirm(choice, secret, SESSION, Counters(10, 5))))
    assert confirmation is not None
    assert confirmation.counters == Counters(10, 5)


def test_another_process_with_the_same_key_cannot_resume() -> None:
    secret, _ = new_session()
    relay = relay_side()
    assert not relay.is_proved(chosen(gateway_side(suspended=suspended(new_session()[0])), relay), secret)
    assert not relay.is_proved(chosen(gateway_side(), relay), secret)


@given(changes=st.fixed_dictionaries({}, optional={"session": st.text(max_size=9), "sent": st.integers(0, 99)}))
def test_nothing_that_a_gateway_says_can_be_changed(changes: dict[str, Any]) -> None:
    secret, known = new_session()
    relay = relay_side()
    said = gateway_side(suspended=suspended(known.secret)).choose(as_said(relay.offer))
    assert said is not None
    choice = relay.read(as_said(said | changes))
    assert choice is not None
    assert relay.is_proved(choice, secret) is (said | changes == said)


def test_what_was_said_once_is_worth_nothing_in_another_handshake() -> None:
    secret, known = new_session()
    said = gateway_side(suspended=suspended(known.secret)).choose(as_said(relay_side().offer))
    later = relay_side()
    choice = later.read(as_said(said))
    assert choice is not None
    assert not later.is_proved(choice, secret)


def test_a_relay_without_the_secret_is_refused() -> None:
    _, known = new_session()
    relay, gateway = relay_side(), gateway_side(suspended=suspended(known.secret))
    choice = chosen(gateway, relay)
    forged = relay.confirm(choice, new_session()[0], SESSION, Counters(10, 5))
    with pytest.raises(RemoteProtocolError, match="altered on its way"):
        gateway.confirmed(SESSION, as_said(forged))


def test_a_key_that_was_replaced_on_its_way_is_noticed() -> None:
    relay, gateway, other = relay_side(), gateway_side(), gateway_side()
    assert gateway.choose(as_said(relay.offer)) is not None
    choice = chosen(other, relay)
    confirmed = relay.confirm(choice, relay.new_secret(choice), SESSION)
    with pytest.raises(RemoteProtocolError, match="altered on its way"):
        gateway.confirmed(SESSION, as_said(confirmed))


def test_a_relay_that_has_forgotten_the_session_makes_a_new_one() -> None:
    _, known = new_session()
    relay, gateway = relay_side(), gateway_side(suspended=suspended(known.secret))
    choice = chosen(gateway, relay)
    secret = relay.new_secret(choice)
    confirmation = gateway.confirmed("another", as_said(relay.confirm(choice, secret, "another")))
    assert confirmation is not None
    assert confirmation.counters is None
    assert same(confirmation.secret, secret)
    assert not same(confirmation.secret, known.secret)


@pytest.mark.parametrize("key", [bytes(32), (1).to_bytes(32, "little")])
def test_a_key_that_makes_the_same_secret_with_all_others_is_refused(key: bytes) -> None:
    relay = relay_side()
    said = gateway_side().choose(as_said(relay.offer))
    assert said is not None
    choice = relay.read(as_said(said | {"key": base64.b64encode(key).decode()}))
    assert choice is not None
    with pytest.raises(RemoteProtocolError, match="'key'"):
        relay.new_secret(choice)


# The negotiation


@pytest.mark.parametrize(("offers", "chooses"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_extension_is_in_force_if_both_ends_have_it(offers: bool, chooses: bool) -> None:
    key, identity = RelayKey("ptk1_the-key-of-the-tests-0123456789abcdef"), SigningIdentity.from_seed(bytes(32))
    relay, gateway = relay_side(), gateway_side()
    choices: dict[str, Choose] = {RESUME: gateway.choose} if chooses else {}
    theirs = RelayHandshake(
        "r", public_names=["relay.test"], identity=identity, offers={RESUME: relay.offer} if offers else {}
    )
    ours = GatewayHandshake(key.identity(), audience="relay.test", service="s", choices=choices)
    answer = ours.receive(theirs.challenge)
    assert isinstance(answer, str)
    claim = theirs.receive(answer)
    assert claim is not None
    theirs.verify(claim, key.identity().public_key)
    said = claim.extensions.get(RESUME)
    choice = None if said is None else relay.read(said)
    assert (choice is not None) is (offers and chooses)
    confirmed = {} if choice is None else {RESUME: relay.confirm(choice, relay.new_secret(choice), SESSION)}
    welcome = ours.receive(
        theirs.welcome(claim, session=SESSION, public_url="u", heartbeat_ms=1000, confirmed=confirmed)
    )
    assert isinstance(welcome, Welcome)
    assert (gateway.confirmed(welcome.session, welcome.extensions.get(RESUME)) is not None) is (offers and chooses)


def test_another_form_of_the_extension_is_ignored() -> None:
    """The oldest vectors of the handshake have one."""
    assert gateway_side().choose(Message(RESUME, {"window_bytes": 1048576})) is None
    assert relay_side().read(Message(RESUME, {"window_bytes": 1048576})) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "AAAA"},
        {"key": 5},
        {"timeout_ms": "9"},
        {"window_bytes": -1},
        {"window_bytes": 1.5},
        {"session": 3},
        {"session": "s", "sent": -1},
        {"session": "s", "sent": 2**63},
        {"session": "s", "tag": "AAAA"},
    ],
)
def test_what_is_malformed_is_refused(changes: dict[str, Any]) -> None:
    _, known = new_session()
    relay = relay_side()
    said = gateway_side(suspended=suspended(known.secret)).choose(as_said(relay.offer))
    assert said is not None
    with pytest.raises(RemoteProtocolError):
        relay.read(as_said(said | changes))


def test_a_malformed_offer_is_an_error_of_the_relay() -> None:
    ours = GatewayHandshake(
        RelayKey("k" * 40).identity(), audience="relay.test", service="s", choices={RESUME: gateway_side().choose}
    )
    theirs = RelayHandshake("r", public_names=["relay.test"], offers={RESUME: {"key": "no"}})
    with pytest.raises(RelayConnectError, match="'key' is not the base64 of 32 bytes"):
        ours.receive(theirs.challenge)


# Texts and secrets


@given(st.integers(0, 2**63 - 1))
def test_a_report_is_read_as_it_was_written(total: int) -> None:
    assert received_in(received_text(total)) == total


@pytest.mark.parametrize("text", ['{"type":"draining","reconnect_within_ms":1}', '{"type":"replaced","by":"received"}'])
def test_other_texts_are_no_reports(text: str) -> None:
    assert received_in(text) is None


@pytest.mark.parametrize("text", ['{"type":"received"}', '{"type":"received","bytes":-1}', '{"type":"received", no'])
def test_a_malformed_report_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        received_in(text)


def test_a_secret_is_not_shown() -> None:
    secret = SessionSecret(b"0123456789abcdef0123456789abcdef")
    confirmation = attrs.evolve(new_session()[1], secret=secret)
    for shown in (repr(secret), str(secret), f"{secret}", repr(confirmation), repr(suspended(secret))):
        assert "0123" not in shown
        assert "***" in shown
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(secret)

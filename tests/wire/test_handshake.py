"""`handshake`: byte for byte what the protocol says, and nothing is proved but by the one who can."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    RelayConnectError,
    RemoteProtocolError,
    TunnelAuthError,
    TunnelError,
)
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._wire.handshake import (
    AGENT,
    Claim,
    GatewayHandshake,
    Rejection,
    RelayHandshake,
    Welcome,
)
from pioneer_tunnel._wire.messages import Draining, Replaced, parse_notice, replaced_text

VECTORS: Final[list[dict[str, str]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "native-auth.json").read_text(encoding="utf-8")
)
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])

KEY: Final = RelayKey("ptk1_the-key-of-the-tests-0123456789abcdef")
OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789")
RELAY: Final = SigningIdentity.from_seed(bytes(range(32)))
AUDIENCE: Final = "relay.test"


def gateway(**changes: Any) -> GatewayHandshake:
    fields: dict[str, Any] = {"identity": KEY.identity(), "audience": AUDIENCE, "service": "svc", "instance": "me"}
    return GatewayHandshake(**(fields | changes))


def relay(**changes: Any) -> RelayHandshake:
    fields: dict[str, Any] = {"relay": "relay-1", "public_names": [AUDIENCE], "identity": RELAY}
    return RelayHandshake(**(fields | changes))


def claim_of(one: GatewayHandshake, other: RelayHandshake) -> Claim:
    answer = one.receive(other.challenge)
    assert isinstance(answer, str)
    claim = other.receive(answer)
    assert claim is not None
    return claim


def changed(text: str, **fields: Any) -> str:
    """A message with some fields changed; those that are None are left out."""
    message = json.loads(text) | fields
    return json.dumps({name: value for name, value in message.items() if value is not None})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Extensions


def welcomed(one: GatewayHandshake, other: RelayHandshake, claim: Claim, **confirmed: dict[str, Any]) -> Welcome:
    welcome = one.receive(other.welcome(claim, session="s", public_url="u", heartbeat_ms=1000, confirmed=confirmed))
    assert isinstance(welcome, Welcome)
    return welcome


def test_an_extension_is_in_force_when_it_is_offered_chosen_and_confirmed() -> None:
    other = relay(offers={"pace": {"most": 9}, "declined": {}, "unknown": {}})
    one = gateway(choices={"pace": lambda offer: {"rate": offer.number("most") - 1}, "declined": lambda _: None})
    claim = claim_of(one, other)
    assert {name: said.fields for name, said in claim.extensions.items()} == {"pace": {"rate": 8}}
    other.verify(claim, KEY.identity().public_key)
    welcome = welcomed(one, other, claim, pace={"rate": claim.extensions["pace"].number("rate")}, unknown={})
    assert {name: said.fields for name, said in welcome.extensions.items()} == {"pace": {"rate": 8}}


def test_an_extension_that_is_not_confirmed_is_not_in_force() -> None:
    one, other = gateway(choices={"pace": lambda _: {}}), relay(offers={"pace": {}})
    claim = claim_of(one, other)
    assert welcomed(one, other, claim).extensions == {}


def test_a_peer_without_extensions_sees_none() -> None:
    one, other = gateway(choices={"pace": lambda _: {}}), relay()
    claim = claim_of(one, other)
    assert b"extensions" not in claim.text
    assert "extensions" not in other.challenge
    older = gateway()
    assert claim_of(older, relay(offers={"pace": {}})).extensions == {}


def test_a_gateway_cannot_choose_what_was_not_offered() -> None:
    one, other = gateway(), relay(offers={"pace": {}})
    answer = one.receive(other.challenge)
    assert isinstance(answer, str)
    claim = other.receive(changed(answer, extensions={"pace": {}, "other": {}}))
    assert claim is not None
    assert [*claim.extensions] == ["pace"]


@pytest.mark.parametrize("wrong", [1, [], "pace", {"pace": 1}, {"pace": None}])
def test_malformed_extensions_are_named(wrong: object) -> None:
    with pytest.raises(RelayConnectError, match="'extensions'"):
        gateway().receive(changed(relay().challenge, extensions=wrong))
    answer = gateway().receive(relay().challenge)
    assert isinstance(answer, str)
    with pytest.raises(RemoteProtocolError, match="'extensions'"):
        relay().receive(changed(answer, extensions=wrong))


# The vectors


def strip_own(text: str) -> dict[str, Any]:
    """What the vectors do not fix: the agent, and extensions, of which this version chooses none."""
    message: dict[str, Any] = json.loads(text)
    return {name: value for name, value in message.items() if name not in {"agent", "extensions"}}


@each_vector
def test_the_gateways_answer_is_that_of_the_vector(vector: dict[str, str]) -> None:
    opening = GatewayHandshake(
        RelayKey(vector["key"]).identity(),
        audience=RelayAddress.parse(vector["url"]).audience,
        service=vector["service"],
        nonce=bytes.fromhex(vector["gateway_nonce"]),
    )
    answer = opening.receive(vector["challenge"])
    assert isinstance(answer, str)
    assert strip_own(answer) == strip_own(vector["authenticate"])
    assert list(json.loads(answer)) == [key for key in json.loads(vector["authenticate"]) if key != "extensions"]
    assert answer == json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False)


@each_vector
def test_the_relay_takes_the_vectors_claim_and_answers_with_its_proof(vector: dict[str, str]) -> None:
    opening = RelayHandshake(
        vector["relay"],
        public_names=[vector["audience"]],
        identity=SigningIdentity.from_seed(bytes.fromhex(vector["relay_private_seed"])),
        nonce=bytes.fromhex(vector["relay_nonce"]),
    )
    if "extensions" in vector["challenge"]:
        # This version offers none; what it sends else is the vector's, byte for byte.
        assert opening.challenge[:-1] == vector["challenge"].partition(',"extensions"')[0]
        return
    assert opening.challenge == vector["challenge"]
    claim = opening.receive(vector["authenticate"])
    assert claim is not None
    key = RelayKey(vector["key"]).identity().public_key
    assert claim.key_id == vector["key_id"] == key.key_id
    opening.verify(claim, key, service=vector["service"])
    welcome = json.loads(opening.welcome(claim, session="s", public_url="http://h", heartbeat_ms=15_000))
    assert welcome["relay_proof"] == vector["relay_proof"]


def test_both_sides_agree_and_pin_each_other() -> None:
    one, other = gateway(pinned_relay=RELAY.public_key), relay()
    claim = claim_of(one, other)
    other.verify(claim, KEY.identity().public_key, service="svc")
    assert (claim.instance, claim.agent, claim.service) == ("me", AGENT, "svc")
    welcome = one.receive(other.welcome(claim, session="s-1", public_url="http://office", heartbeat_ms=20_000))
    assert welcome == Welcome(session="s-1", public_url="http://office", heartbeat=20.0)


def test_the_key_is_in_no_message() -> None:
    one, other = gateway(), relay()
    answer = one.receive(other.challenge)
    assert isinstance(answer, str)
    assert KEY.reveal() not in answer
    assert KEY.reveal() not in repr((one, other, other.receive(answer)))


# What is ignored


def test_unknown_keys_and_types_are_ignored() -> None:
    one, other = gateway(), relay()
    assert one.receive('{"type":"weather"}') is None
    assert other.receive('{"type":"weather","x":[1]}') is None
    challenge = changed(other.challenge, extensions={"unheard-of": {"deep": [1]}}, colour="red")
    answer = one.receive(challenge)
    assert isinstance(answer, str)
    assert "extensions" not in json.loads(answer)
    claim = other.receive(changed(answer, colour="blue", extensions={"unheard-of": {}}))
    assert claim is not None
    welcome = '{"type":"welcome","session":"s","public_url":"u","heartbeat_ms":15000,"extensions":{"x":{}},"more":null}'
    assert isinstance(one.receive(welcome), Welcome)
    assert parse_notice('{"type":"weather"}') is None


def test_texts_before_the_proof_are_bounded() -> None:
    """A stranger pays nothing for a text of unknown type, and its reader has to parse JSON."""
    one, other = gateway(), relay()
    for receive in (one.receive, other.receive):
        for _ in range(4):
            assert receive('{"type":"weather"}') is None
    with pytest.raises(RemoteProtocolError, match="more than 4 texts"):
        other.receive('{"type":"weather"}')
    with pytest.raises(RelayConnectError, match="more than 4 texts"):
        one.receive(relay().challenge)


@pytest.mark.parametrize(
    ("heartbeat_ms", "seconds"),
    [(15_000, 15), (1, 1), (0, 1), (-5, 1), (999, 1), (60_001, 60), (2**53, 60), (1500.5, 1.5005), (None, 15)],
)
def test_the_heartbeat_is_clamped(heartbeat_ms: float | None, seconds: float) -> None:
    one = gateway()
    one.receive(relay().challenge)
    welcome = one.receive(changed('{"type":"welcome","session":"s","public_url":"u"}', heartbeat_ms=heartbeat_ms))
    assert isinstance(welcome, Welcome)
    assert welcome.heartbeat == pytest.approx(seconds)


# What is malformed

NOT_JSON: Final = [
    "", "{", "nonsense", "[]", '"text"', "7", "null", "{}", '{"type":7}', '{"type":null}',
    "[" * 100_000, '{"type":' * 20_000, '{"type":"challenge","version":' + "9" * 10_000 + "}",
]  # fmt: skip


def test_a_public_url_cannot_steer_a_terminal_or_forge_a_line() -> None:
    one, other = gateway(), relay()
    claim = claim_of(one, other)
    welcome = other.welcome(claim, session="s", public_url="http://a\n\x1b[2J\u202eb\u2028c", heartbeat_ms=15_000)
    said = one.receive(welcome)
    assert isinstance(said, Welcome)
    assert said.public_url == "http://a [2J b c"


@pytest.mark.parametrize("text", NOT_JSON, ids=[text[:20] for text in NOT_JSON])
def test_what_is_no_message_is_an_error_on_either_side(text: str) -> None:
    with pytest.raises((RelayConnectError, RemoteProtocolError)):
        gateway().receive(text)
    if not text.startswith('{"type":"challenge"'):
        with pytest.raises(RemoteProtocolError):
            relay().receive(text)
        with pytest.raises(RemoteProtocolError):
            parse_notice(text)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *[("version", wrong) for wrong in (None, "1", True, 1.0, [1])],
        *[("relay", wrong) for wrong in (None, 7, "x" * 1025, "\ud800", ["r"])],
        *[("nonce", wrong) for wrong in (None, 7, "", "AAAA", b64(bytes(31)), b64(bytes(33)), "!" * 44, "é" * 44)],
    ],
    ids=repr,
)
def test_a_malformed_challenge_is_named(field: str, wrong: object) -> None:
    with pytest.raises(RelayConnectError, match=f"'challenge' is not valid: '{field}'"):
        gateway().receive(changed(relay().challenge, **{field: wrong}))


@pytest.mark.parametrize("field", ["key_id", "service", "audience", "nonce", "proof"])
@pytest.mark.parametrize("wrong", [None, 7, True, [], {}, "x" * 1025, "\udfff"], ids=repr)
def test_a_malformed_claim_is_named(field: str, wrong: object) -> None:
    answer = gateway().receive(relay().challenge)
    assert isinstance(answer, str)
    with pytest.raises(RemoteProtocolError, match=f"'{field}'"):
        relay().receive(changed(answer, **{field: wrong}))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *[("session", wrong) for wrong in (None, 7, "\ud83d")],
        *[("public_url", wrong) for wrong in (None, 7, "x" * 1025)],
        *[("heartbeat_ms", wrong) for wrong in ("15", True, float("nan"), float("inf"), 10**400, ["15"])],
    ],
    ids=repr,
)
def test_a_malformed_welcome_is_named(field: str, wrong: object) -> None:
    one = gateway()
    one.receive(relay().challenge)
    welcome = '{"type":"welcome","session":"s","public_url":"u","heartbeat_ms":15000}'
    with pytest.raises(RelayConnectError, match=f"'welcome' is not valid: '{field}'"):
        one.receive(changed(welcome, **{field: wrong}))


@pytest.mark.parametrize(
    ("before", "text"),
    [([], '{"type":"welcome","session":"s","public_url":"u"}'), ([relay().challenge], relay().challenge)],
    ids=["welcome", "second challenge"],
)
def test_what_comes_out_of_turn_is_refused(before: list[str], text: str) -> None:
    one = gateway()
    for earlier in before:
        one.receive(earlier)
    with pytest.raises(RelayConnectError, match="out of turn"):
        one.receive(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers() | st.just(10**400),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
fields = st.sampled_from(
    ["type", "version", "relay", "nonce", "reason", "message", "retry_after_ms", "reconnect_within_ms", "by", "proof"]
)
kinds = st.sampled_from(["challenge", "welcome", "rejected", "authenticate", "draining", "replaced"])


@fuzzed()
@given(json_values, fields, kinds)
def test_nothing_else_than_our_errors_comes_out(value: Any, field: str, kind: str) -> None:
    text = json.dumps({"type": kind, field: value})
    for receive in (gateway().receive, relay().receive, parse_notice):
        try:
            receive(text)
        except (TunnelError, RemoteProtocolError) as error:
            str(error).encode()  # it can be logged


tokens = [
    *('{"type":"', '"challenge"', '"welcome"', '"rejected"', '"authenticate"', '"version":1', '"reason":"busy"'),
    *("{", "}", "[", "]", ":", ",", '"', "\\u", "1e999", "NaN", "-0", "9" * 5000, "\ud800", "\x00", "[" * 3000),
]
json_like = st.lists(st.sampled_from(tokens) | st.text(max_size=5), max_size=12).map("".join)


@fuzzed()
@given(st.text() | json_like, st.booleans())
def test_any_text_is_a_message_or_our_error(text: str, challenged: bool) -> None:
    one, other = gateway(), relay()
    if challenged:
        one.receive(other.challenge)
    for receive in (one.receive, other.receive, parse_notice):
        try:
            receive(text)
        except (TunnelError, RemoteProtocolError) as error:
            str(error).encode()


# What is rejected


def test_a_wrong_key_and_an_unknown_one_get_the_same_answer() -> None:
    other = relay()
    claim = claim_of(gateway(), other)
    with pytest.raises(Rejection) as unknown:
        other.verify(claim, None)
    with pytest.raises(Rejection) as wrong:
        other.verify(claim, OTHER_KEY.identity().public_key)
    assert unknown.value.reason == "auth_failed"
    assert unknown.value.text == wrong.value.text


@pytest.mark.parametrize("key", [None, OTHER_KEY.identity().public_key])
def test_names_and_services_are_told_only_to_who_has_proved_itself(key: Any) -> None:
    """Else anyone could ask a relay what it is called, and which services there are."""
    other = relay()
    claim = claim_of(gateway(audience="wrong.test", service="wrong"), other)
    with pytest.raises(Rejection) as unproved:
        other.verify(claim, key, service="svc")
    assert unproved.value.reason == "auth_failed"
    assert AUDIENCE not in unproved.value.text


def test_a_proved_claim_for_another_name_is_wrong_audience() -> None:
    for audience in ("wrong.test", "relay.test:444", "not a name", "", "relay.test/path"):
        other = relay()
        with pytest.raises(Rejection) as rejected:
            other.verify(claim_of(gateway(audience=audience), other), KEY.identity().public_key)
        assert rejected.value.reason == "wrong_audience"
        assert AUDIENCE in rejected.value.text


def test_a_proved_claim_for_another_service_is_service_unknown() -> None:
    other = relay()
    claim = claim_of(gateway(), other)
    with pytest.raises(Rejection) as rejected:
        other.verify(claim, KEY.identity().public_key, service="printer")
    assert rejected.value.reason == "service_unknown"
    other.verify(claim, KEY.identity().public_key, service=None)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@fuzzed()
@given(relay_id=texts, audience=texts, service=texts, relay_nonce=st.binary(min_size=32, max_size=32), challenge=texts)
def test_a_proof_is_worth_nothing_anywhere_else(
    relay_id: str, audience: str, service: str, relay_nonce: bytes, challenge: str
) -> None:
    """Replayed at another relay, for another name or service, or at another moment, it never verifies."""
    here = relay(nonce=bytes(32))
    claim = claim_of(gateway(nonce=b"\1" * 32), here)
    key = KEY.identity().public_key
    here.verify(claim, key)
    replays: list[tuple[RelayHandshake, Claim]] = []
    if relay_id != "relay-1":
        replays.append((relay(relay=relay_id, nonce=bytes(32)), claim))
    if relay_nonce != bytes(32):
        replays.append((relay(nonce=relay_nonce), claim))
    if audience != AUDIENCE:
        names = [AUDIENCE, audience]
        replays.append((relay(nonce=bytes(32), public_names=names), attrs.evolve(claim, audience=audience)))
    if service != "svc":
        replays.append((here, attrs.evolve(claim, service=service)))
    if relay_nonce != claim.nonce:
        replays.append((here, attrs.evolve(claim, nonce=relay_nonce)))
    for there, replayed in replays:
        with pytest.raises(Rejection) as rejected:
            there.verify(replayed, key)
        assert rejected.value.reason == "auth_failed"


def test_a_proof_is_bound_to_the_challenge_as_it_was_sent() -> None:
    """Who changes as much as a space in the challenge on its way, or adds an extension, gets a proof of no use."""
    for changed_on_its_way in (
        lambda text: text.replace(":", ": ", 1),
        lambda text: changed(text, extensions={"weaker": {}}),
    ):
        one, other = gateway(), relay()
        answer = one.receive(changed_on_its_way(other.challenge))
        assert isinstance(answer, str)
        claim = other.receive(answer)
        assert claim is not None
        with pytest.raises(Rejection, match="auth_failed"):
            other.verify(claim, KEY.identity().public_key)


@pytest.mark.parametrize("identity", [None, SigningIdentity.generate()])
def test_a_relay_without_the_pinned_identity_is_refused(identity: SigningIdentity | None) -> None:
    one, other = gateway(pinned_relay=RELAY.public_key), relay(identity=identity)
    claim = claim_of(one, other)
    with pytest.raises(RelayConnectError, match="pinned"):
        one.receive(other.welcome(claim, session="s", public_url="u", heartbeat_ms=1000))


def test_a_relay_proof_of_another_opening_is_refused() -> None:
    other = relay()
    earlier = other.welcome(claim_of(gateway(), other), session="s", public_url="u", heartbeat_ms=1000)
    one = gateway(pinned_relay=RELAY.public_key)
    one.receive(other.challenge)
    with pytest.raises(RelayConnectError, match="pinned"):
        one.receive(earlier)


@pytest.mark.parametrize("proof", ["", "x", 7, b64(bytes(63)), b64(bytes(65))])
def test_a_malformed_relay_proof_is_refused_where_it_matters(proof: object) -> None:
    welcome = changed('{"type":"welcome","session":"s","public_url":"u"}', relay_proof=proof)
    pinned, easy = gateway(pinned_relay=RELAY.public_key), gateway()
    for one in (pinned, easy):
        one.receive(relay().challenge)
    with pytest.raises(RelayConnectError):
        pinned.receive(welcome)
    assert isinstance(easy.receive(welcome), Welcome)


@pytest.mark.parametrize(
    ("reason", "kind", "final", "slowly", "after"),
    [
        ("auth_failed", TunnelAuthError, True, False, None),
        ("service_unknown", InvalidSettingsError, True, False, None),
        ("wrong_audience", InvalidSettingsError, True, False, None),
        ("version", RelayConnectError, False, True, None),
        ("busy", RelayConnectError, False, False, 2.5),
        ("a reason of tomorrow", RelayConnectError, False, True, None),
    ],
)
def test_a_rejection_means_what_its_reason_says(
    reason: str, kind: type[TunnelError], final: bool, slowly: bool, after: float | None
) -> None:
    for challenged in (True, False):
        one = gateway()
        if challenged:
            one.receive(relay().challenge)
        with pytest.raises(TunnelError) as rejected:
            one.receive(Rejection(reason, "go\r\naway\x1b[0m", retry_after_ms=2500).text)
        error = rejected.value
        assert type(error) is kind
        assert (error.final, error.retry_slowly, error.retry_after) == (final, slowly, after)
        assert "'go away [0m'" in str(error)
        if kind is InvalidSettingsError:
            assert repr("svc" if reason == "service_unknown" else AUDIENCE) in str(error)


@pytest.mark.parametrize("retry_after_ms", [None, 0])
def test_a_busy_relay_need_not_say_for_how_long(retry_after_ms: int | None) -> None:
    with pytest.raises(RelayConnectError) as busy:
        gateway().receive(Rejection("busy", "", retry_after_ms=retry_after_ms).text)
    assert busy.value.retry_after is None


def test_a_negative_retry_after_asks_for_nothing_odd() -> None:
    with pytest.raises(RelayConnectError) as busy:
        gateway().receive(Rejection("busy", "", retry_after_ms=-5000).text)
    assert busy.value.retry_after is None or busy.value.retry_after >= 0


@pytest.mark.parametrize("version", [0, 2, -1, 10**9])
def test_another_version_is_retried_slowly(version: int) -> None:
    with pytest.raises(RelayConnectError, match=f"version {version} ") as refused:
        gateway().receive(changed(relay().challenge, version=version))
    assert refused.value.retry_slowly


# Notices


def test_notices() -> None:
    assert parse_notice('{"type":"draining","reconnect_within_ms":1500}') == Draining(reconnect_within=1.5)
    assert parse_notice('{"type":"draining","reconnect_within_ms":-1}') == Draining(reconnect_within=0)
    assert parse_notice('{"type":"draining"}') == Draining(reconnect_within=0)
    assert parse_notice(replaced_text("me", "a\nb")) == Replaced(by="me", message="a b")
    assert parse_notice('{"type":"replaced"}') == Replaced(by="", message="")
    for wrong in ('{"type":"draining","reconnect_within_ms":"1"}', '{"type":"replaced","by":7}'):
        with pytest.raises(RemoteProtocolError):
            parse_notice(wrong)


@pytest.mark.parametrize("text", ['{"type":"draining","type":"replaced"}', '{"type":"x","a":{"b":1,"b":1}}'])
def test_a_key_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="not JSON"):
        parse_notice(text)

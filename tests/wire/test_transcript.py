"""`Transcript`: the vectors, and no two different transcripts have the same bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Final

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity, new_relay_key
from pioneer_tunnel._wire.transcript import Transcript

VECTORS: Final[list[dict[str, str]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "native-auth.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors(vector: dict[str, str]) -> None:
    identity = RelayKey(vector["key"]).identity()
    transcript = Transcript(
        relay=vector["relay"],
        audience=RelayAddress.parse(vector["url"]).audience,
        service=vector["service"],
        relay_nonce=bytes.fromhex(vector["relay_nonce"]),
        gateway_nonce=bytes.fromhex(vector["gateway_nonce"]),
        challenge=vector["challenge"].encode(),
    )
    assert transcript.audience == vector["audience"]
    assert transcript.gateway_bytes().hex() == vector["transcript"]
    proof = identity.sign(transcript.gateway_bytes())
    assert base64.b64encode(proof).decode() == vector["proof"]
    assert identity.public_key.verify(proof, transcript.gateway_bytes())
    authenticate = vector["authenticate"].encode()
    assert transcript.relay_bytes(authenticate).hex() == vector["relay_transcript"]
    relay = SigningIdentity.from_seed(bytes.fromhex(vector["relay_private_seed"]))
    assert str(relay.public_key) == vector["relay_public_key"]
    relay_proof = relay.sign(transcript.relay_bytes(authenticate))
    assert base64.b64encode(relay_proof).decode() == vector["relay_proof"]
    assert relay.public_key.verify(relay_proof, transcript.relay_bytes(authenticate))


TRANSCRIPT: Final = Transcript(
    relay="relay-1", audience="a.example", service="s", relay_nonce=b"r" * 32, gateway_nonce=b"g" * 32, challenge=b"{}"
)


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Transcript)])
def test_a_proof_is_worth_nothing_when_anything_else_was_seen(field: str) -> None:
    identity = new_relay_key().identity()
    proof = identity.sign(TRANSCRIPT.gateway_bytes())
    value = getattr(TRANSCRIPT, field)
    other = attrs.evolve(TRANSCRIPT, **{field: value + value[:1]})
    assert identity.public_key.verify(proof, TRANSCRIPT.gateway_bytes())
    assert not identity.public_key.verify(proof, other.gateway_bytes())
    assert not identity.public_key.verify(proof, TRANSCRIPT.relay_bytes(b""))
    assert not new_relay_key().identity().public_key.verify(proof, TRANSCRIPT.gateway_bytes())


@given(texts=st.lists(st.text(max_size=5), min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_no_two_transcripts_have_the_same_bytes(texts: list[str]) -> None:
    relay, audience, service, other_relay, other_audience, other_service = texts
    one = attrs.evolve(TRANSCRIPT, relay=relay, audience=audience, service=service)
    two = attrs.evolve(TRANSCRIPT, relay=other_relay, audience=other_audience, service=other_service)
    assert (one.gateway_bytes() == two.gateway_bytes()) == (one == two)
    assert one.gateway_bytes() != one.relay_bytes(b"")

"""Gateways that prove no key: what each failure costs, and that all look alike."""

from __future__ import annotations

import json
import sys
from types import FrameType
from typing import Any, Final, final

import pytest
import trio
import trio.testing
from admissions import limits, never
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rig import (
    KEY,
    RELAY_NAME,
    relay_config,
    tunnel_entry,
)

from pioneer_tunnel._model import keys as identity
from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.keys import PublicKey, RelayKey
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._wire.handshake import SUBPROTOCOL, Claim, GatewayHandshake, Rejection, RelayHandshake
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.admission import Admission, Arrival
from pioneer_tunnel.relay.gateways.endpoint import GatewayEndpoint
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.websocket import Opening, load_engine

WRONG_KEY: Final = RelayKey("ptk1_a-key-that-no-relay-knows-0123456789")


async def refused_after(arrival: Arrival | None, key: RelayKey, registered: str | None, **said: str) -> float:
    """Seconds from a gateway's proof with `key` to its rejection, where the relay knows the key `registered`.

    Args:
        said: fields of its answer that it changes after it was signed.
    """
    tunnels = [] if registered is None else [TunnelEntry(**tunnel_entry(key=registered))]
    endpoint = GatewayEndpoint(relay_config(), LocalRegistry(tunnels), LocalDirectory())
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    opening = GatewayHandshake(key.identity(), audience=RELAY_NAME, service="any")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.serve_request, watched, watched, arrival)
        address = RelayAddress.parse(f"ws://{RELAY_NAME}")
        async with load_engine().connect(ours, Opening(subprotocol=SUBPROTOCOL, address=address)) as websocket:
            (challenge,) = await websocket.receive()
            assert isinstance(challenge, str)
            answer = opening.receive(challenge)
            assert isinstance(answer, str)
            if registered is not None:  # the right key id, and another one's proof
                named = PublicKey.parse(registered).key_id
                answer = answer.replace(key.identity().key_id, named)
            answer = json.dumps(json.loads(answer) | said)
            started = trio.current_time()
            await websocket.send([answer])
            (rejected,) = await websocket.receive()
            assert isinstance(rejected, str)
            assert '"auth_failed"' in rejected
            return trio.current_time() - started


async def test_failed_proofs_of_an_address_are_slowed_down_alike(autojump_clock: trio.testing.MockClock) -> None:
    """An unknown key and a wrong proof wait equally long: the time counts failures, and nothing else."""
    known = str(KEY.identity().public_key)
    for first, second in ((None, known), (known, None)):
        admission = Admission(limits(failed_auth_delay_ms=100, failed_auth_delay_max_ms=400))
        waits = []
        for number in range(5):
            arrival = admission.arrive("192.0.2.1", trio.current_time(), never)
            waits.append(await refused_after(arrival, WRONG_KEY, first if number % 2 else second))
            arrival.leave()
        assert waits == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
        other = admission.arrive("192.0.2.2", trio.current_time(), never)
        assert await refused_after(other, WRONG_KEY, first) == pytest.approx(0.1)
    assert await refused_after(None, WRONG_KEY, known) == 0


def test_an_unknown_key_and_a_wrong_proof_take_the_same_path() -> None:
    """No statistics: the very calls are the same, in the same order, with arguments of the same sizes."""

    def calls_of(key: PublicKey | None) -> list[str]:
        relay = RelayHandshake("relay", public_names=[RELAY_NAME], nonce=bytes(32))
        gateway = GatewayHandshake(WRONG_KEY.identity(), audience=RELAY_NAME, service="any", nonce=bytes(32))
        answer = gateway.receive(relay.challenge)
        assert isinstance(answer, str)
        claim = relay.receive(answer)
        assert isinstance(claim, Claim)
        calls: list[str] = []

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event in {"call", "c_call"}:
                name = frame.f_code.co_qualname if event == "call" else getattr(argument, "__qualname__", "?")
                calls.append(f"{event} {name}")

        sys.setprofile(note)
        try:
            relay.verify(claim, key)
        except Rejection as rejection:
            told = rejection.text
        finally:
            sys.setprofile(None)
        return [*calls, told]

    calls_of(None)  # caches are warm after that
    unknown, wrong = calls_of(None), calls_of(KEY.identity().public_key)
    assert any("verify" in call for call in unknown)
    assert unknown == wrong


@final
class CountedVerifications:
    """Replaces `Ed25519PublicKey`, and counts the signatures that are verified with real points of the curve."""

    def __init__(self) -> None:
        self.count = 0

    def from_public_bytes(self, raw: bytes) -> Any:
        key = Ed25519PublicKey.from_public_bytes(raw)
        PublicKey.parse(f"ed25519:{raw.hex()}")  # with anything else the library is done at once

        class Counted:
            def verify(_, signature: bytes, message: bytes) -> None:  # noqa: N805  # `self` is the one around it
                self.count += 1
                key.verify(signature, message)

        return Counted()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"audience": "another.test"},
        {"audience": ""},
        {"service": "another"},
        {"key_id": "00"},
        {"key_id": "\u00e9"},
    ],
    ids=repr,
)
async def test_an_unknown_key_costs_the_relay_the_same_work(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One verification in any case, so that timing does not reveal which keys exist."""
    counted = CountedVerifications()
    monkeypatch.setattr(identity, "Ed25519PublicKey", counted)
    for registered in (None, str(KEY.identity().public_key)):
        counted.count = 0
        await refused_after(None, WRONG_KEY, registered, **said)
        assert counted.count == 1

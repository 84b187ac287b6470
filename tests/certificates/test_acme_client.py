"""The client against pebble, alone and behind a front that limits rates and suggests when to renew."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
from acme import client
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from josepy.b64 import b64decode
from josepy.jwa import ES256
from josepy.jwk import JWKEC
from pebble import Front, Pebble, pebble
from rig import eventually, free_port, no_hang

from pioneer_tunnel import AcmeConfig, PrefixedStream
from pioneer_tunnel._net.tls.by_name import answer_challenge, read_hello
from pioneer_tunnel.certificates.authority import ChallengeKind, OrderFailed, Scope
from pioneer_tunnel.certificates.client import ANSWER_LIMIT, AcmeAuthority
from pioneer_tunnel.certificates.keeper import AcmeCertificates
from pioneer_tunnel.certificates.store import Store

NAME, OTHER = "a.test", "b.test"


@pytest.fixture
def front(authority: Pebble) -> Iterator[Front]:
    with Front(authority).running() as running:
        yield running


@asynccontextmanager
async def keeping(
    authority: Pebble, config: AcmeConfig, *names: str, wall_clock: Callable[[], float] = time.time
) -> AsyncIterator[AcmeCertificates]:
    """Keep certificates, and answer the authority."""
    certificates = AcmeCertificates(config, wall_clock=wall_clock)
    certificates.want(names)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            hello, received = await read_hello(stream)
            await answer_challenge(PrefixedStream(stream, received), hello, certificates)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(authority.tls_port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        nursery.start_soon(certificates.run)
        with no_hang():
            yield certificates
        nursery.cancel_scope.cancel()


def all_certified(certificates: AcmeCertificates) -> bool:
    return all(one.not_after_unix for one in certificates.status.values())


def kept(config: AcmeConfig, name: str) -> bytes:
    (file,) = config.folder.glob(f"*/certificates/{name}.pem")
    return file.read_bytes()


def leaf(config: AcmeConfig, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(kept(config, name))


async def test_a_rate_limit_is_obeyed_and_stops_no_other_name_for_long(front: Front) -> None:
    problem = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many certificates, retry later"}
    front.refusals["/order-plz"] = [(429, {"Retry-After": "7200"}, problem)]
    config, offset = front.behind.config(directory=front.directory), 0.0
    async with keeping(front.behind, config, NAME, OTHER, wall_clock=lambda: time.time() + offset) as certificates:
        await eventually(lambda: certificates.status[NAME].retry_at_unix)
        status = certificates.status[NAME]
        assert "too many certificates, retry later; it is tried again" in (status.message or "")
        assert abs((status.retry_at_unix or 0) - time.time() - 7200) < 60
        certificates.retry_now()
        offset = 120.0
        certificates.retry_now()  # so that it looks at the clock
        await eventually(lambda: certificates.status[OTHER].not_after_unix)
        assert certificates.status[NAME].not_after_unix is None
        offset = 7300.0
        certificates.retry_now()
        await eventually(lambda: certificates.status[NAME].not_after_unix)


async def test_a_revoked_certificate_is_replaced_while_it_serves(front: Front) -> None:
    front.suggests = True
    config, offset = front.behind.config(directory=front.directory), 0.0
    async with keeping(front.behind, config, NAME, wall_clock=lambda: time.time() + offset) as certificates:
        await eventually(lambda: all_certified(certificates))
        before, context = leaf(config, NAME), await certificates.context_of(NAME)
        assert context is not None
        await trio.to_thread.run_sync(revoke, front.behind, kept(config, NAME))
        assert front.behind.is_revoked(before.serial_number)
        offset = 7 * 3600.0  # the front has said to ask again in 6 hours
        certificates.retry_now()
        await eventually(lambda: leaf(config, NAME) != before)
        await eventually(lambda: len(front.orders) == 2)
        serial = before.serial_number.to_bytes(before.serial_number.bit_length() // 8 + 1)
        assert replaced_serial(front.orders[1]["replaces"]) == serial
        assert "replaces" not in front.orders[0]


def replaced_serial(identifier: str) -> bytes:
    return bytes(b64decode(identifier.partition(".")[2]))


def revoke(authority: Pebble, pem: bytes) -> None:
    """Revoke a certificate with its own key, as whoever has stolen it may."""
    key = serialization.load_pem_private_key(pem, None)
    network = client.ClientNetwork(JWKEC(key=key), alg=ES256)
    network.verify_ssl = str(authority.folder / "web-ca.pem")  # type: ignore[assignment]
    directory = client.ClientV2.get_directory(authority.directory, network)
    client.ClientV2(directory, network).revoke(x509.load_pem_x509_certificate(pem), 0)
    network.session.close()


@pytest.mark.slow
async def test_an_order_that_was_replaced_before_is_placed_without_saying_so(front: Front) -> None:
    front.suggests = True
    config, offset = front.behind.config(directory=front.directory), 0.0
    async with keeping(front.behind, config, NAME, wall_clock=lambda: time.time() + offset) as certificates:
        await eventually(lambda: all_certified(certificates))
        before = leaf(config, NAME)
        problem = {"type": "urn:ietf:params:acme:error:alreadyReplaced", "detail": "replaced"}
        front.refusals["/order-plz"] = [(409, {}, problem)]
        offset = (before.not_valid_after_utc.timestamp() - time.time()) * 0.96
        certificates.retry_now()
        await eventually(lambda: leaf(config, NAME) != before)
        assert ["replaces" in order for order in front.orders] == [False, True, False]


@pytest.mark.slow
async def test_an_authority_that_has_forgotten_the_account_gets_another(front: Front) -> None:
    config = front.behind.config(directory=front.directory)
    async with keeping(front.behind, config, NAME) as certificates:
        await eventually(lambda: all_certified(certificates))
        (account,) = config.folder.glob("*/account.json")
        before = account.read_text()
        assert account.stat().st_mode & 0o777 == 0o600
        front.behind.stop()
        await trio.to_thread.run_sync(front.behind.start)
        certificates.want([NAME, OTHER])
        await eventually(lambda: all_certified(certificates))
        assert account.read_text() != before


@pytest.mark.slow
async def test_another_program_with_the_account_uses_it(front: Front) -> None:
    config = front.behind.config(directory=front.directory)
    for name in (NAME, OTHER):
        async with keeping(front.behind, config, name) as certificates:
            await eventually(partial(all_certified, certificates))


@pytest.mark.slow
async def test_refused_nonces_are_tried_again(tmp_path: Path) -> None:
    """pebble refuses some for no reason, so that clients learn to try again."""
    with pebble(tmp_path, nonces_rejected=10) as authority:
        async with keeping(authority, authority.config(email="operator@example.com"), NAME) as certificates:
            while not all_certified(certificates):
                certificates.retry_now()
                await trio.sleep(0.1)


REFUSALS: Final = {
    "externalAccountRequired": (Scope.AUTHORITY, "says: no"),
    "userActionRequired": (Scope.AUTHORITY, "no; read the authority's new terms of service, then remove account.json"),
    "serverInternal": (Scope.AUTHORITY, "says: no"),
    "badNonce": (Scope.AUTHORITY, "says: no"),
    "rateLimited": (Scope.RATE_LIMIT, "no; it is tried again when the authority allows it"),
    "rejectedIdentifier": (Scope.NAME, "no; the authority makes no certificates for a.test"),
    "caa": (Scope.NAME, "no; add this authority to the CAA records of the domain of a.test, or name another directory"),
    "dns": (Scope.NAME, "no; give a.test an A or AAAA record in the DNS that leads to the relay"),
}


def ordering(config: AcmeConfig) -> Callable[[], object]:
    store = Store(config.folder, config.directory)
    authority = AcmeAuthority(config.directory, email=None, ca_file=config.ca_file, store=store)
    return partial(authority.order, NAME, b"", kind=ChallengeKind.TLS_ALPN_01, replaces=None)


def test_what_the_authority_says_is_told_with_what_to_do(front: Front) -> None:
    order = ordering(front.behind.config(directory=front.directory))
    for code, (scope, told) in REFUSALS.items():
        problem = {"type": f"urn:ietf:params:acme:error:{code}", "detail": "no"}
        front.refusals["/order-plz"] = [(403, {"Retry-After": "60"}, problem)] * (2 if code == "badNonce" else 1)
        with pytest.raises(OrderFailed) as failed:
            order()
        assert told in str(failed.value)
        assert (failed.value.scope, failed.value.retry_after) == (scope, 60.0)


def test_something_else_than_an_authority(front: Front) -> None:
    front.refusals["/dir"] = [(200, {"Content-Type": "application/json"}, {"hello": "world"})]
    for directory, told in (
        (front.directory, "something else than ACME"),
        (front.directory + "/nothing", "something else than ACME: HTTP status 404"),
        (
            f"https://127.0.0.1:{free_port()}/dir",
            "cannot be reached: Failed to establish a new connection: [Err",
        ),
    ):
        with pytest.raises(OrderFailed) as failed:
            ordering(front.behind.config(directory=directory))()
        assert told in str(failed.value)
        assert failed.value.scope is Scope.AUTHORITY
    with pytest.raises(OrderFailed, match=r"cannot be reached: \[SSL: CERTIFICATE_VERIFY_FAILED\]"):
        ordering(front.behind.config(directory=front.directory, ca_file=None))()


def test_an_answer_without_end_is_not_kept(front: Front) -> None:
    huge = {"hello": "x" * ANSWER_LIMIT}
    front.refusals["/dir"] = [(200, {"Content-Type": "application/json"}, huge)]
    with pytest.raises(OrderFailed, match=f"something else than ACME: more than {ANSWER_LIMIT} bytes"):
        ordering(front.behind.config(directory=front.directory))()


def test_an_authority_leads_to_no_server_without_tls(front: Front) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        port = elsewhere.getsockname()[1]
        front.refusals["/dir"] = [(302, {"Location": f"http://127.0.0.1:{port}/dir"}, {})]
        with pytest.raises(OrderFailed, match="cannot be reached"):
            ordering(front.behind.config(directory=front.directory))()
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_what_an_authority_says_is_one_line_of_a_log(front: Front) -> None:
    problem = {"type": "urn:ietf:params:acme:error:caa", "detail": "no\n2026-11-30 INFO all is well\x1b[2J"}
    front.refusals["/order-plz"] = [(403, {}, problem)]
    with pytest.raises(OrderFailed) as failed:
        ordering(front.behind.config(directory=front.directory))()
    assert str(failed.value).isprintable()


def test_an_authority_for_customers_alone(front: Front) -> None:
    directory = json.loads(front.behind.get(front.behind.directory))
    directory["meta"] = {"externalAccountRequired": True}
    front.refusals["/dir"] = [(200, {"Content-Type": "application/json"}, directory)]
    with pytest.raises(OrderFailed, match="external account binding"):
        ordering(front.behind.config(directory=front.directory))()

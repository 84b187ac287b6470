"""`AcmeCertificates` in virtual time, with an authority that follows a script: when it orders, and what it keeps."""

from __future__ import annotations

import datetime as dt
import functools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pioneer_tunnel import InvalidSettingsError, StorageError
from pioneer_tunnel.certificates import keeper as keeper_module
from pioneer_tunnel.certificates.authority import Authority, Challenge, ChallengeKind, Order, OrderFailed, Scope
from pioneer_tunnel.certificates.config import AcmeConfig
from pioneer_tunnel.certificates.keeper import AcmeCertificates
from pioneer_tunnel.certificates.store import Store
from pioneer_tunnel.testing import virtual_time, wall_clock
from pioneer_tunnel.testing.virtual_time import without_threads

HOUR, DAY = 3600.0, 86_400.0
TOKEN: Final = b"/.well-known/acme-challenge/token"
ISSUER: Final = ec.generate_private_key(ec.SECP256R1())


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in virtual time that may be years, and without threads."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        with without_threads():
            virtual_time(limit=5 * 365 * DAY)(test)(**arguments)

    return run


def issue(csr: bytes, days: float, *, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    request = x509.load_pem_x509_csr(csr)
    now = dt.datetime.fromtimestamp(wall_clock(), dt.UTC)
    public = request.public_key() if key is None else key.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        x509.CertificateBuilder()
        .subject_name(request.subject)
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the authority")]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(names, critical=False)
        .sign(ISSUER, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


@attrs.define(eq=False)
class Scripted(Authority):
    """An authority that issues at once, unless `failures` has something for the next order of a name."""

    days: float = 90.0
    failures: dict[str, list[Exception]] = attrs.field(factory=dict)
    orders: list[tuple[float, str]] = attrs.field(factory=list)
    replaced: list[bytes | None] = attrs.field(factory=list)
    suggestions: list[float | Exception | None] = attrs.field(factory=list)
    polls: int = 2
    another_key: bool = False

    def order(self, name: str, csr: bytes, *, kind: ChallengeKind, replaces: bytes | None) -> Order:
        self.orders.append((trio.current_time(), name))
        self.replaced.append(replaces)
        if self.failures.get(name):
            raise self.failures[name].pop(0)
        return ScriptedOrder(self, name, csr, kind, self.polls)

    def suggestion(self, certificate: bytes) -> tuple[float | None, float]:
        found = self.suggestions.pop(0) if self.suggestions else None
        if isinstance(found, Exception):
            raise found
        return found, DAY


@attrs.define(eq=False)
class ScriptedOrder(Order):
    authority: Scripted
    name: str
    csr: bytes
    kind: ChallengeKind
    polls: int
    begun: bool = False

    @property
    def challenges(self) -> tuple[Challenge, ...]:
        return (Challenge(self.name, self.kind, "token", "authorization"),)

    def begin_validation(self) -> None:
        self.begun = True

    def is_validated(self) -> bool:
        assert self.begun
        self.polls -= 1
        return self.polls < 0

    def certificate(self) -> bytes | None:
        another = ISSUER if self.authority.another_key else None
        return issue(self.csr, self.authority.days, key=another)


def keeper(folder: Path, authority: Authority, *, http: bool = True) -> AcmeCertificates:
    config = AcmeConfig(terms_accepted=True, folder=folder)
    return AcmeCertificates(config, http=http, authority=authority, wall_clock=wall_clock)


@asynccontextmanager
async def running(certificates: AcmeCertificates, *names: str) -> AsyncIterator[None]:
    certificates.want(names)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(certificates.run)
        await trio.sleep(10)
        yield
        nursery.cancel_scope.cancel()


def no(text: str = "no", scope: Scope = Scope.NAME, retry_after: float | None = None) -> OrderFailed:
    return OrderFailed(text, scope=scope, retry_after=retry_after)


@in_virtual_time
async def test_it_renews_for_months_and_swaps_without_a_restart(tmp_path: Path) -> None:
    authority = Scripted()
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test"):
        contexts = set()
        for _ in range(5):
            contexts.add(await certificates.context_of("a.test"))
            until = certificates.status["a.test"].not_after_unix
            assert until is not None
            assert until > wall_clock() + 29 * DAY
            await trio.sleep(30 * DAY)
        contexts.add(await certificates.context_of("a.test"))
        assert None not in contexts
        assert len(contexts) == len(authority.orders) == 3
        assert authority.replaced[0] is None
        assert None not in authority.replaced[1:], "each order says what it replaces"


@in_virtual_time
async def test_a_failure_takes_nothing_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Scripted(days=6)
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test"):
        before = await certificates.context_of("a.test")
        stored = (*(tmp_path / "c").glob("*/certificates/a.test.pem"),)[0]
        content = stored.read_bytes()
        authority.failures["a.test"] = [no("the CA says no; do this")] * 50
        await trio.sleep(5 * DAY)
        status = certificates.status["a.test"]
        assert status.message == "the CA says no; do this"
        assert status.retry_at_unix is not None
        assert await certificates.context_of("a.test") is before
        await trio.sleep(5 * DAY)
        assert await certificates.context_of("a.test") is before, "also one that has expired: visitors see why"
        assert stored.read_bytes() == content
        assert "there is no new certificate for a.test: the CA says no; do this" in caplog.text
        authority.failures.clear()
        await trio.sleep(DAY * 1.3)
        assert await certificates.context_of("a.test") is not before
        assert certificates.status["a.test"].message is None


@in_virtual_time
async def test_one_name_that_fails_stops_no_other(tmp_path: Path) -> None:
    authority = Scripted(failures={"a.test": [no()] * 99, "b.test": [ValueError("a bug")]})
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test", "b.test", "c.test"):
        assert certificates.status["c.test"].not_after_unix is not None
        assert "unforeseen failure" in (certificates.status["b.test"].message or "")
        await trio.sleep(120)
        assert certificates.status["b.test"].not_after_unix is not None
        assert await certificates.context_of("a.test") is None
        assert await certificates.context_of(None) is await certificates.context_of("b.test")
        assert await certificates.context_of("unknown.test") is None


@in_virtual_time
async def test_names_come_and_go(tmp_path: Path) -> None:
    authority = Scripted()
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test"):
        certificates.want(["b.test"])
        await trio.sleep(10)
        assert [*certificates.status] == ["b.test"]
        assert await certificates.context_of("a.test") is None
        certificates.want(["a.test", "b.test"])
        await trio.sleep(10)
        assert await certificates.context_of("a.test") is not None
        assert [name for _, name in authority.orders] == ["a.test", "b.test"], "it was still there"


@in_virtual_time
async def test_a_crash_loop_orders_no_more_than_an_hour_allows(tmp_path: Path) -> None:
    authority = Scripted(failures={"a.test": [no()] * 99})
    for _ in range(20):
        async with running(keeper(tmp_path / "c", authority), "a.test"):
            pass
    assert len(authority.orders) == 4
    await trio.sleep(HOUR)
    async with running(keeper(tmp_path / "c", authority), "a.test"):
        pass
    assert len(authority.orders) == 5, "a restart tries at once, if the hour allows it"


@in_virtual_time
async def test_what_the_authority_asks_for_outlives_a_restart(tmp_path: Path) -> None:
    authority = Scripted(failures={"a.test": [no("limit", Scope.RATE_LIMIT, 7200.0)]})
    async with running(keeper(tmp_path / "c", authority), "a.test"):
        pass
    again = keeper(tmp_path / "c", authority)
    async with running(again, "a.test"):
        again.retry_now()
        await trio.sleep(HOUR)
        assert again.status["a.test"].message == "limit"
        assert len(authority.orders) == 1
        await trio.sleep(HOUR)
        assert len(authority.orders) == 2


@in_virtual_time
async def test_two_of_them_do_not_order_at_once(tmp_path: Path) -> None:
    """As while a relay hands over to its successor."""
    authority = Scripted()
    first, second = keeper(tmp_path / "c", authority), keeper(tmp_path / "c", authority)
    second.want(["a.test", "b.test", "c.test"])
    async with trio.open_nursery() as nursery:
        async with running(first, "a.test"):
            nursery.start_soon(second.run)
            await trio.sleep(10)
            first.want(["b.test"])
            await trio.sleep(60)
            assert [name for _, name in authority.orders] == ["a.test", "b.test"]
            assert await second.context_of("a.test") is not None, "it uses what the other one has made before"
        await trio.sleep(10)
        assert [name for _, name in authority.orders] == ["a.test", "b.test", "c.test"], "and after"
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_while_nobody_can_reach_us_nothing_is_ordered(tmp_path: Path) -> None:
    authority = Scripted()
    certificates = keeper(tmp_path / "c", authority)
    certificates.set_reachable(False)
    async with running(certificates, "a.test"):
        await trio.sleep(DAY)
        assert authority.orders == []
        certificates.set_reachable(True)
        await trio.sleep(10)
        assert len(authority.orders) == 1


@pytest.mark.parametrize("http", [True, False])
@in_virtual_time
async def test_challenges_are_answered_while_an_order_is_under_way(tmp_path: Path, http: bool) -> None:
    certificates = keeper(tmp_path / "c", Scripted(polls=10**9), http=http)
    async with running(certificates, "a.test"):
        answers = {certificates.http_answer("a.test", TOKEN), certificates.challenge_context("a.test")}
        assert None in answers, "by one way alone"
        assert len(answers) == 2
        assert (b"authorization" in answers) is http
        for host, target in (("b.test", TOKEN), ("a.test", TOKEN + b"?"), ("a.test", b"/")):
            assert certificates.http_answer(host, target) is None
        assert certificates.challenge_context("b.test") is certificates.challenge_context(None) is None
        await trio.sleep(130)
        assert "did not decide within 120 seconds" in (certificates.status["a.test"].message or "")
        assert {certificates.http_answer("a.test", TOKEN), certificates.challenge_context("a.test")} == {None}


@in_virtual_time
async def test_a_certificate_of_another_key_is_not_stored(tmp_path: Path) -> None:
    certificates = keeper(tmp_path / "c", Scripted(another_key=True))
    async with running(certificates, "a.test"):
        assert "of another key" in (certificates.status["a.test"].message or "")
        assert await certificates.context_of("a.test") is None


@in_virtual_time
async def test_a_suggestion_renews_early(tmp_path: Path) -> None:
    authority = Scripted(suggestions=[wall_clock() + 80 * DAY, wall_clock() - 1])
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test"):
        assert len(authority.orders) == 1
        await trio.sleep(DAY)
        assert len(authority.orders) == 2


@in_virtual_time
async def test_no_suggestion_is_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    failures = [no("it does not say"), StorageError("damaged"), KeyError("a bug")]
    authority = Scripted(suggestions=[*failures, wall_clock() - 1])
    async with running(keeper(tmp_path / "c", authority), "a.test"):
        await trio.sleep(4 * HOUR)
        assert len(authority.orders) == 2, "it is asked again"
    for told in ("it does not say", "damaged", "unforeseen"):
        assert told in caplog.text


@in_virtual_time
async def test_damaged_files_are_reported_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Scripted()
    async with running(keeper(tmp_path / "c", authority), "a.test", "b.test"):
        pass
    (folder,) = (tmp_path / "c").iterdir()
    (folder / "orders.json").write_text("{")
    (folder / "certificates" / "a.test.pem").write_text("nothing")
    os_open = folder / "certificates" / "b.test.pem"
    os_open.chmod(0o644)
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test", "b.test"):
        assert await certificates.context_of("a.test") is not None
        assert await certificates.context_of("b.test") is not None
    assert "earlier orders are forgotten" in caplog.text
    assert "the certificate of b.test cannot be used" in caplog.text
    assert os_open.stat().st_mode & 0o777 == 0o600


@in_virtual_time
async def test_a_full_disk_is_reported_before_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise StorageError("orders.json cannot be written: no space")

    monkeypatch.setattr(Store, "keep_records", full)
    authority = Scripted()
    certificates = keeper(tmp_path / "c", authority)
    async with running(certificates, "a.test"):
        assert authority.orders == []
        assert certificates.status["a.test"].message == "orders.json cannot be written: no space"


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    keeper(tmp_path / "c", Scripted())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").rglob("*")} == {0o700}
    (tmp_path / "c").chmod(0o755)
    with pytest.raises(StorageError, match="chmod 700"):
        keeper(tmp_path / "c", Scripted())


@pytest.mark.parametrize("name", ["../a.test", "a/b", "", "A.test", "a..test", "a.test\n"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "c", "https://ca.test/dir")
    with pytest.raises(ValueError, match="is no name for a certificate"):
        store.path_of(name)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pioneer_tunnel.certificates.client", None)
    with pytest.raises(InvalidSettingsError, match=r"pip install 'pioneer-tunnel\[acme\]'"):
        AcmeCertificates(AcmeConfig(terms_accepted=True, folder=tmp_path / "c"))


async def test_an_authority_that_does_not_end_its_answer_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "CALL_TIMEOUT", 0.1)
    answered, calls = threading.Event(), 0

    class Endless(Scripted):
        def order(self, *arguments: Any, **options: Any) -> Order:
            nonlocal calls
            calls += 1
            answered.wait()
            raise no()

    certificates = keeper(tmp_path / "c", Endless())
    certificates.want(["a.test"])
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(certificates.run)
            with trio.fail_after(60):
                while "did not answer within" not in (certificates.status["a.test"].message or ""):
                    await trio.sleep(0.01)
            certificates.retry_now()
            await trio.sleep(0.3)
            assert calls == 1, "its thread is not joined by others"
            nursery.cancel_scope.cancel()
    finally:
        answered.set()


@in_virtual_time
async def test_names_that_are_wanted_no_more_are_not_kept(tmp_path: Path) -> None:
    certificates = keeper(tmp_path / "c", Scripted())
    certificates.set_reachable(False)
    async with running(certificates, "a.test"):
        for number in range(100):
            certificates.want([f"host{number}.test"])
            await trio.sleep(1)
        assert len(certificates._looked_at) <= 2
        certificates.set_reachable(True)
        certificates.want(["a.test"])
        await trio.sleep(60)
        assert certificates.status["a.test"].not_after_unix, "one that comes back is looked at again"


@pytest.mark.parametrize("http", [True, False])
def test_processes_that_share_a_folder_answer_for_each_other(tmp_path: Path, http: bool) -> None:
    """The authority may reach any worker of a relay. One orders; the others answer, and use what it gets."""

    @in_virtual_time
    async def run() -> None:
        authority = Scripted()
        one, other = (keeper(tmp_path / "c", authority, http=http) for _ in range(2))
        answered: list[bool] = []
        heard: list[str] = []

        async def let_the_other_know(what: str, told: Any) -> None:
            heard.append(what)
            await other.hear(what, json.loads(json.dumps(told)))
            if what == "challenges":
                by_http, by_tls = other.http_answer("a.test", TOKEN), other.challenge_context("a.test")
                answered.append(by_http == b"authorization" if http else by_tls is not None)

        one.let_others_know = let_the_other_know

        def valid_until(certificates: AcmeCertificates) -> int | None:
            return certificates.status["a.test"].not_after_unix

        other.want(["a.test"])
        async with running(one, "a.test"):
            assert one.orders
            first = await other.context_of("a.test")
            assert first is not None
            assert valid_until(other) == valid_until(one)
            await trio.sleep(70 * DAY)
            assert await other.context_of("a.test") is not first, "it was renewed"
            assert valid_until(other) == valid_until(one)
        assert heard == ["challenges", "certificate"] * 2
        assert answered == [True, True]

    run()

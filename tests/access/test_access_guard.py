"""The guard of a service: who is let through, with which answer, and what attempts cost."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from access_rig import OPEN, TOKEN, basic, htpasswd_file, tokens_file
from rig import no_hang, request

from pioneer_tunnel import Access
from pioneer_tunnel._http.head import HeadReader, RequestHead
from pioneer_tunnel.access import workers
from pioneer_tunnel.access.attempts import ACCEPTED_FOR, MOST_ATTEMPTS, PER_ATTEMPT, REFUSED_FOR
from pioneer_tunnel.access.guard import Guard, guard_of
from pioneer_tunnel.access.htpasswd import Htpasswd
from pioneer_tunnel.access.secret_file import CHECK_INTERVAL

HERE = "192.0.2.7"


def head(*lines: str) -> RequestHead:
    found = HeadReader().feed(request(*lines))
    assert found is not None
    return found


async def status(guard: Guard, *lines: str, visitor: str | None = HERE, source: str | None = "") -> int:
    """The status that a request gets; 200 if it is let through, and then later ones are, at once."""
    source = visitor if source == "" else source
    with no_hang():
        denial = await guard.check(head(*lines), visitor, source)
    if denial is None:
        assert guard.allows_now(head(*lines), visitor, source)
        return 200
    assert not guard.allows_now(head(*lines), visitor, source)
    return denial.status


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that were computed."""
    computed: list[bytes] = []
    verify = Htpasswd.verify

    def counted(self: Htpasswd, user: bytes, password: bytes) -> bool:
        computed.append(password)
        return verify(self, user, password)

    monkeypatch.setattr(Htpasswd, "verify", counted)
    return computed


@pytest.mark.parametrize(
    ("visitor", "admitted"),
    [
        ("192.0.2.8", True), ("192.0.2.7", False), ("198.51.100.1", False), ("::ffff:192.0.2.8", True),
        ("::ffff:192.0.2.7", False), ("2001:db8::1", True), ("2001:db9::1", False), (None, False),
    ],
)  # fmt: skip
async def test_networks(visitor: str | None, admitted: bool) -> None:
    guard = guard_of(Access(allow=["192.0.2.0/24", "2001:db8::/32"], deny=["192.0.2.7"]))
    assert guard.admits(visitor) is admitted
    assert await status(guard, visitor=visitor) == (200 if admitted else 403)


async def test_denied_networks_alone_admit_the_others() -> None:
    guard = guard_of(Access(deny=["192.0.2.0/24"]))
    assert [await status(guard, visitor=one) for one in ("192.0.2.1", "198.51.100.1", None)] == [403, 200, 403]
    assert await status(guard_of(Access()), visitor=None) == 200


async def test_passwords(tmp_path: Path) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path), open_paths=[OPEN], realm='a "b" \\'))
    assert await status(guard, basic()) == 200
    for lines in ([], [basic("wrong")], [basic("right", "bob")], [f"Authorization: Bearer {TOKEN}"]):
        assert await status(guard, *lines) == 401
    assert await status(guard, basic(), basic()) == 400
    assert await status(guard, basic(), "Authorization:") == 400
    denial = await guard.check(head(), HERE, HERE)
    assert denial is not None
    challenge = b'\r\nWWW-Authenticate: Basic realm="a \\"b\\" \\\\", charset="UTF-8"\r\n'
    assert challenge in denial.response(omit_body=False)


async def test_tokens(tmp_path: Path) -> None:
    guard = guard_of(Access(bearer_tokens=tokens_file(tmp_path)))
    right, wrong = f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}x"
    assert await status(guard, right) == 200
    assert await status(guard, right, right) == 400
    for _ in range(MOST_ATTEMPTS):
        assert await status(guard, wrong) == 401
    assert await status(guard, wrong) == await status(guard, right) == 429
    assert await status(guard, right, visitor="192.0.2.8") == 200


async def test_a_password_is_computed_once_for_all_who_ask(tmp_path: Path, computed: list[bytes]) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    async with trio.open_nursery() as nursery:
        for password in ("right", "wrong") * 20:
            nursery.start_soon(status, guard, basic(password))
    assert sorted(computed) == [b"right", b"wrong"]


async def test_results_are_forgotten(tmp_path: Path, computed: list[bytes], mock_clock: trio.testing.MockClock) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    for password, code, seconds in (("right", 200, ACCEPTED_FOR), ("wrong", 401, REFUSED_FOR)):
        computed.clear()
        assert [await status(guard, basic(password)) for _ in range(3)] == [code] * 3
        mock_clock.jump(seconds)
        assert not guard.allows_now(head(basic(password)), HERE, HERE)
        assert await status(guard, basic(password)) == code
        assert len(computed) == 2


async def test_a_removed_user_is_refused_on_a_kept_connection(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    assert await status(guard, basic()) == 200
    htpasswd_file(tmp_path, bob="right")
    mock_clock.jump(CHECK_INTERVAL)
    assert not guard.allows_now(head(basic()), HERE, HERE)
    assert await status(guard, basic()) == 401
    assert await status(guard, basic("right", "bob")) == 200


async def test_attempts_are_limited_by_address_and_lock_nobody_else_out(
    tmp_path: Path, computed: list[bytes], mock_clock: trio.testing.MockClock
) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path), open_paths=[OPEN]))
    assert await status(guard, basic(), visitor="192.0.2.8") == 200
    for number in range(MOST_ATTEMPTS):
        assert await status(guard, basic(str(number))) == 401
    computed.clear()
    denial = await guard.check(head(basic("one more")), HERE, HERE)
    assert denial is not None
    assert denial.status == 429
    assert denial.headers == (("Retry-After", "6"),)
    # Not even a right password that is remembered: the answer would tell it.
    assert await status(guard, basic()) == 429
    assert not computed
    assert await status(guard, basic(), visitor="192.0.2.8") == 200
    assert await status(guard, basic("wrong"), visitor="192.0.2.9") == 401
    assert await status(guard) == 401
    mock_clock.jump(PER_ATTEMPT)
    assert await status(guard, basic()) == 200


async def test_attempts_at_a_time_are_limited_too(tmp_path: Path, computed: list[bytes]) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(status, guard, basic(str(number)))
    assert len(computed) == MOST_ATTEMPTS


async def test_the_same_wrong_password_again_is_no_attempt(tmp_path: Path) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    assert {await status(guard, basic("old")) for _ in range(3 * MOST_ATTEMPTS)} == {401}


async def test_few_threads_and_a_bounded_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    release, most, busy = threading.Event(), 0, 0
    lock = threading.Lock()

    def verify(_self: Htpasswd, _user: bytes, _password: bytes) -> bool:
        nonlocal most, busy
        with lock:
            busy += 1
            most = max(most, busy)
        release.wait()
        with lock:
            busy -= 1
        return False

    monkeypatch.setattr(Htpasswd, "verify", verify)
    codes: list[int] = []
    with no_hang():
        async with trio.open_nursery() as nursery:
            for number in range(workers.MOST_WAITING + 10):

                @nursery.start_soon
                async def ask(number: int = number) -> None:
                    codes.append(await status(guard, basic(str(number)), source=None))

            while len(codes) < 10:
                await trio.sleep(0.01)
            release.set()
    assert most <= workers.THREADS
    assert codes.count(503) == 10
    assert codes.count(401) == workers.MOST_WAITING


async def test_one_who_leaves_does_not_take_the_result_with_it(tmp_path: Path, computed: list[bytes]) -> None:
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as leaving:
            nursery.start_soon(status, guard, basic())
            leaving.cancel()
            await guard.check(head(basic()), HERE, HERE)
    assert await status(guard, basic()) == 200
    assert computed


async def test_without_its_file_nobody_is_let_in_but_to_open_paths(tmp_path: Path) -> None:
    guard = guard_of(Access(basic_auth=tmp_path / "missing", open_paths=["/"]))
    assert await status(guard, "Content-Length: 1", basic()) == 503
    assert await status(guard) == 200


async def test_neither_password_nor_raw_user_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    guard = guard_of(Access(basic_auth=htpasswd_file(tmp_path)))
    await status(guard, basic("pass-of-bob", "bob\u202e" + "x" * 100))
    assert "pass-of-bob" not in caplog.text
    assert "bob" in caplog.text
    assert "\u202e" not in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


async def test_equal_rules_have_one_guard(tmp_path: Path) -> None:
    path = htpasswd_file(tmp_path)
    assert guard_of(Access(basic_auth=path)) is guard_of(Access(basic_auth=path))
    assert guard_of(Access(basic_auth=path)) is not guard_of(Access(basic_auth=path, realm="other"))

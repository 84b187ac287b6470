"""`AcmeCertificates`: certificates by name, which it orders, keeps on disk, renews, and swaps in while it runs.

    certificates = AcmeCertificates(AcmeConfig(terms_accepted=True), http=False)
    certificates.want(["office.example.com"])
    nursery.start_soon(certificates.run)

One task orders, one name after the other, as `policy` decides. The calls of `client` run in threads. A certificate from
the disk is used at once, whatever the authority does; a failure never takes it away.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, final

import attrs
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .._model.callbacks import nothing
from .._model.certificate_status import CertificateStatus
from .._model.errors import InvalidSettingsError, StorageError, TunnelError
from .._net.tls.by_name import Certificates
from .._net.tls.certificate import Certificate
from .answers import Answers, challenge_context
from .authority import Authority, Challenge, ChallengeKind, OrderFailed, Scope
from .config import AcmeConfig
from .policy import Lifetime, Schedule
from .store import Store, lifetime_of

if TYPE_CHECKING:
    from .client import AcmeAuthority

__all__ = ["AcmeCertificates", "authority_class"]

VALIDATION_TIMEOUT: Final = 120.0
"""Seconds that an authority has to look at a name, and to make the certificate."""
CALL_TIMEOUT: Final = 300.0
"""Seconds for one call of the client, which may be six requests. An authority can send an answer byte by byte."""
_FIRST_POLL, _LAST_POLL = 0.1, 5.0
_LONGEST_SLEEP: Final = 3600.0
"""Seconds between two looks at the clock, which may have been set."""
_LOCK_RETRY: Final = 2.0
_CHECK_RETRY: Final = 3600.0
"""Seconds until an authority is asked again when to renew, after a failure."""

_CHALLENGES: Final = "challenges"
_CERTIFICATE: Final = "certificate"
"""What other processes have to know: which challenges to answer, and that there is a certificate for a name."""

_T = TypeVar("_T")
_log: Final = logging.getLogger("pioneer_tunnel.certificates")


async def _nobody_else(_what: str, _told: Any) -> None:
    """The default of `let_others_know`."""


@final
class AcmeCertificates(Certificates):
    """Certificates that are ordered from an ACME authority and renewed, while `run` runs.

    Args:
        config: how; its paths are used as they are.
        http: whether the authority looks at names by HTTP-01, which has to be answered with `http_answer`; by
            default by TLS-ALPN-01.
        authority: by default the one of `config`.
        random: spreads delays.
        wall_clock: seconds since 1970.

    Raises:
        InvalidSettingsError: the extra `acme` is not installed.
        StorageError: the folder cannot be used.
    """

    def __init__(
        self,
        config: AcmeConfig,
        *,
        http: bool = False,
        authority: Authority | None = None,
        random: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store: Final = Store(config.folder, config.directory)
        self._authority: Final = authority or _authority(config, self._store)
        self._kind: Final = ChallengeKind.HTTP_01 if http else ChallengeKind.TLS_ALPN_01
        self._wall_clock: Final = wall_clock
        self._schedule: Final = Schedule(random or Random())  # noqa: S311  # jitter, no secret
        self._answers: Final = Answers()
        self._names: tuple[str, ...] = ()
        self._loaded: Final[dict[str, Certificate]] = {}
        self._chains: Final[dict[str, bytes]] = {}
        self._looked_at: Final[set[str]] = set()
        self._reachable = True
        self._running: Final = trio.Lock()
        self._asking: Final = trio.CapacityLimiter(1)
        self._changed = trio.Event()
        self._told: Mapping[str, CertificateStatus] = {}
        self.on_change: Callable[[], object] = nothing
        """Called when `status` says something else than before."""
        self.let_others_know: Callable[[str, Any], Awaitable[object]] = _nobody_else
        """Awaited with what other processes with this folder have to know: theirs is `hear`. For JSON."""
        self.orders = False
        """Whether it is this process that orders. While another one does, `status` tells no failures."""
        self._others: Final = ExitStack()

    @property
    def status(self) -> dict[str, CertificateStatus]:
        """The status of each name."""
        now = self._wall_clock()
        return {name: self._schedule.status(name, now) for name in self._names}

    def want(self, names: Iterable[str]) -> None:
        """Have certificates for these names from now on, and for no others. Does not wait.

        Names are as in a `ClientHello`: lower-case, as A-label. The first one with a certificate also serves visitors
        that ask for no name.
        """
        wanted = tuple(dict.fromkeys(names))
        if wanted != self._names:
            self._names = wanted
            self._looked_at.intersection_update(wanted)  # a relay may name others again and again
            self._wake()

    def set_reachable(self, reachable: bool) -> None:
        """Whether an authority can reach us now (by default it can). If not, nothing is ordered. Does not wait."""
        if reachable is not self._reachable:
            self._reachable = reachable
            self._wake()

    def retry_now(self) -> None:
        """Order failed names again now, as far as the authority and the limits of an hour allow it. Does not wait."""
        self._schedule.retry_now()
        self._wake()

    def http_answer(self, host: str, target: bytes) -> bytes | None:
        """The body of the answer to an authority's GET; None if it asks for nothing of ours."""
        return self._answers.http(host, target)

    async def context_of(self, name: str | None) -> ssl.SSLContext | None:
        if name is None:
            name = next((one for one in self._names if one in self._loaded), None)
        certificate = self._loaded.get(name) if name in self._names and name is not None else None
        return None if certificate is None else await certificate.context()

    def challenge_context(self, name: str | None) -> ssl.SSLContext | None:
        return self._answers.tls(name)

    async def hear(self, what: str, told: Any) -> None:
        """Another process with this folder lets us know what it does.

        Args:
            what, told: what it has passed to `let_others_know`.
        """
        if what == _CERTIFICATE:
            await self._load([told])
            self._tell()
        elif what == _CHALLENGES:
            challenges = [Challenge(**{**one, "kind": ChallengeKind(one["kind"])}) for one in told]
            contexts = await _contexts_of(challenges)
            self._others.close()
            self._others.enter_context(self._answers.offered(challenges, contexts))

    async def load(self) -> None:
        """Use what is on the disk for the wanted names. `run` does so, too; this is to have it before visitors come."""
        await self._load(name for name in self._names if name not in self._looked_at)

    async def run(self) -> NoReturn:
        """Order and renew until cancelled. While another process or task does, wait for its end."""
        async with self._running, trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_loaded)
            async with self._locked():
                self.orders = True
                await self._restore()
                await self._load(self._names)  # the process before may have renewed some
                while True:
                    await self._do_next()

    async def _keep_loaded(self) -> None:
        while True:
            changed = self._changed
            await self.load()
            self._tell()
            # No deadline: most programs want the same names for ever.
            await changed.wait()

    async def _do_next(self) -> None:
        now, changed = self._wall_clock(), self._changed
        self._schedule.note_time(now)
        names = [name for name in self._names if name in self._looked_at] if self._reachable else []
        if (name := self._schedule.next_order(names, now)) is not None:
            await self._order(name)
        elif (name := self._schedule.next_check(names, now)) is not None:
            await self._check(name)
        else:
            with trio.move_on_after(min(self._schedule.wake_at(names, now) - now, _LONGEST_SLEEP)):
                await changed.wait()
        self._tell()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _tell(self) -> None:
        status = self.status
        if status != self._told:
            self._told = status
            self.on_change()

    # One order

    async def _order(self, name: str) -> None:
        schedule = self._schedule
        schedule.note_order(name, self._wall_clock())
        try:
            await self._keep_records()  # before: if this process dies now, the order counts
            chain = await self._obtain(name)
        except OrderFailed as failed:
            self._note_failure(name, failed)
        except StorageError as error:
            self._note_failure(name, OrderFailed(str(error), scope=Scope.AUTHORITY))
        except Exception as error:  # noqa: BLE001  # a bug must not end the other names, and not the relay
            _log.exception("ordering the certificate of %s has failed in an unforeseen way", name)
            self._note_failure(name, OrderFailed(f"an unforeseen failure, see the log: {error!r}", scope=Scope.NAME))
        else:
            schedule.note_certificate(name, Lifetime(*lifetime_of(chain)))
            schedule.note_success(name)
            _log.info("there is a new certificate for %s", name)
            await self.let_others_know(_CERTIFICATE, name)
        with suppress(StorageError):  # it was reported above, or will be with the next order
            await self._keep_records()

    def _note_failure(self, name: str, failed: OrderFailed) -> None:
        now, text, retry_after = self._wall_clock(), str(failed), failed.retry_after
        _log.warning("there is no new certificate for %s: %s", name, text)
        match failed.scope:
            case Scope.NAME:
                self._schedule.note_failure(name, now, text, retry_after=retry_after)
            case Scope.RATE_LIMIT:
                self._schedule.note_rate_limit(name, now, text, retry_after=retry_after)
            case Scope.AUTHORITY:
                self._schedule.note_authority_failure(now, text, retry_after=retry_after)

    async def _obtain(self, name: str) -> bytes:
        """Order a certificate, and use it."""
        key, csr = await _in_thread(partial(_key_and_request, name))
        place = partial(self._authority.order, name, csr, kind=self._kind, replaces=self._chains.get(name))
        order = await self._ask(place)
        challenges = order.challenges
        contexts = await _contexts_of(challenges)
        deadline = trio.current_time() + VALIDATION_TIMEOUT
        with self._answers.offered(challenges, contexts):
            if challenges:
                await self.let_others_know(_CHALLENGES, [attrs.asdict(one) for one in challenges])
                await self._ask(order.begin_validation)
                await _until(partial(self._ask, order.is_validated), deadline)
        chain = await _until(partial(self._ask, order.certificate), deadline)
        if not _belongs_to(chain, key):
            raise OrderFailed("the authority has sent a certificate of another key", scope=Scope.AUTHORITY)
        self._loaded[name] = await trio.to_thread.run_sync(self._store_and_load, name, key, chain)
        self._chains[name] = chain
        return chain

    def _store_and_load(self, name: str, key: bytes, chain: bytes) -> Certificate:
        self._store.keep_certificate(name, key, chain)
        return self._stored(name)

    def _stored(self, name: str) -> Certificate:
        path = self._store.path_of(name)
        return Certificate(path, path)

    async def _ask(self, call: Callable[[], _T]) -> _T:
        """Call the authority. If cancelled or too late, the thread is abandoned; until its end, no other is begun.

        Raises:
            OrderFailed: what the call raises; or it takes longer than `CALL_TIMEOUT`.
        """
        with trio.move_on_after(CALL_TIMEOUT):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._asking)
        raise OrderFailed(f"the authority did not answer within {CALL_TIMEOUT:g} seconds", scope=Scope.AUTHORITY)

    async def _check(self, name: str) -> None:
        now = self._wall_clock()
        renew_at, again = None, _CHECK_RETRY
        try:
            renew_at, again = await self._ask(partial(self._authority.suggestion, self._chains[name]))
        except (OrderFailed, StorageError) as error:
            _log.info("it is not known when the certificate of %s should be renewed: %s", name, error)
        except Exception:  # noqa: BLE001  # as above
            _log.exception("asking when to renew the certificate of %s has failed in an unforeseen way", name)
        self._schedule.note_suggestion(name, renew_at, check_at=now + again)

    # The disk

    async def _load(self, names: Iterable[str]) -> None:
        for name in [*names]:
            try:
                found = await trio.to_thread.run_sync(self._read, name)
            except (TunnelError, ValueError) as error:
                _log.error("the certificate of %s cannot be used: %s", name, error)
                found = None
            if found is not None:
                self._loaded[name], self._chains[name] = found
                self._schedule.note_certificate(name, Lifetime(*lifetime_of(found[1])))
            self._looked_at.add(name)
            self._wake()

    def _read(self, name: str) -> tuple[Certificate, bytes] | None:
        chain = self._store.certificate(name)
        return None if chain is None else (self._stored(name), chain)

    async def _restore(self) -> None:
        try:
            self._schedule.restore(await trio.to_thread.run_sync(self._store.records), self._wall_clock())
        except (StorageError, ValueError) as error:
            _log.error("earlier orders are forgotten: %s", error)
        self._schedule.retry_now()  # the cause may have been repaired before this start

    async def _keep_records(self) -> None:
        await trio.to_thread.run_sync(self._store.keep_records, self._schedule.records(self._wall_clock()))

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        with ExitStack() as stack:
            waiting = False
            while True:
                try:
                    await trio.to_thread.run_sync(stack.enter_context, self._store.locked())
                    break
                except StorageError as error:
                    if not waiting:
                        _log.info("certificates are not ordered yet: %s", error)
                        waiting = True
                # No deadline: a predecessor may take long to end.
                await trio.sleep(_LOCK_RETRY)
            yield


def authority_class() -> type[AcmeAuthority]:
    """What speaks to an authority.

    Raises:
        InvalidSettingsError: the extra `acme` is not installed.
    """
    try:
        from .client import AcmeAuthority  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise InvalidSettingsError(
            f"automatic certificates need the extra acme ({error}): pip install 'pioneer-tunnel[acme]'"
        ) from None
    return AcmeAuthority


def _authority(config: AcmeConfig, store: Store) -> Authority:
    return authority_class()(config.directory, email=config.email, ca_file=config.ca_file, store=store)


async def _in_thread(call: Callable[[], _T]) -> _T:
    """Run a blocking call that takes no network. If cancelled, the thread is abandoned."""
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


async def _until(poll: Callable[[], Awaitable[_T | None]], deadline: float) -> _T:
    """Await `poll` until it returns something that is true.

    Raises:
        OrderFailed: what it raises; or it has not until `deadline`.
    """
    delay = _FIRST_POLL
    while trio.current_time() < deadline:
        if result := await poll():
            return result
        await trio.sleep(delay)
        delay = min(2 * delay, _LAST_POLL)
    raise OrderFailed(f"the authority did not decide within {VALIDATION_TIMEOUT:g} seconds", scope=Scope.NAME)


async def _contexts_of(challenges: Sequence[Challenge]) -> list[ssl.SSLContext]:
    """The contexts for those challenges that are answered in TLS."""
    by_tls = [challenge for challenge in challenges if challenge.kind is ChallengeKind.TLS_ALPN_01]
    return [await _in_thread(partial(challenge_context, challenge)) for challenge in by_tls]


def _key_and_request(name: str) -> tuple[bytes, bytes]:
    """A new private key, and a request for a certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, request.public_bytes(serialization.Encoding.PEM)


def _belongs_to(chain: bytes, key: bytes) -> bool:
    """Whether a certificate is that of a key, both PEM."""
    try:
        certified = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError:
        return False
    return certified == serialization.load_pem_private_key(key, None).public_key()

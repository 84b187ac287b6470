"""An ACME authority over certbot's `acme` library. Everything here blocks: call it in a thread, one call at a time.

The library signs, keeps nonces and parses. It has no TLS-ALPN-01 (RFC 8737) since its version 5, and no `replaces` in
an order (RFC 9773, 5), which tells the authority that an order is a renewal; some limit those less. So a class for each
is here.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import urlsplit

import requests
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.b64 import b64encode
from josepy.errors import Error as JoseError
from josepy.json_util import field
from josepy.jwa import ES256
from josepy.jwk import JWK, JWKEC
from requests.adapters import HTTPAdapter

from .._model.retry_after import retry_after_seconds
from .._model.text import clean_message
from .._version import __version__
from .authority import Authority, Challenge, ChallengeKind, Order, OrderFailed, Scope
from .explaining import explain
from .store import Store

__all__ = ["AcmeAuthority"]

REQUEST_TIMEOUT: Final = 30
"""Seconds for one request."""
CHECK_INTERVAL: Final = 6 * 3600.0
"""Seconds until the authority is asked again when to renew, if it does not say (RFC 9773, 4.3.3)."""
ANSWER_LIMIT: Final = 1024 * 1024
"""Bytes of one answer."""
MOST_REDIRECTS: Final = 4
_CHECK_BOUNDS: Final = (60.0, 24 * 3600.0)

_OBJECT: Final = re.compile(r"(<.*?>|\w+\(.*?\)): ")

_log: Final = logging.getLogger("pioneer_tunnel.certificates")

_NAME_CODES: Final = frozenset(
    {"rejectedIdentifier", "unsupportedIdentifier", "caa", "dns", "dnssec", "malformed", "badCSR"}
)
"""Codes of RFC 8555, 6.7, that concern the name when an order is refused at once."""


@challenges.ChallengeResponse.register
class _TlsAlpn01Response(challenges.KeyAuthorizationChallengeResponse):
    typ = str(ChallengeKind.TLS_ALPN_01)


@challenges.Challenge.register
class _TlsAlpn01(challenges.KeyAuthorizationChallenge):
    response_cls = _TlsAlpn01Response
    typ = _TlsAlpn01Response.typ

    def validation(self, account_key: JWK, **_others: Any) -> str:
        return self.key_authorization(account_key)


@final
class _Bounded(HTTPAdapter):
    """Reads answers of bounded length."""

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        response = super().send(*arguments, **options)
        content = bytearray()
        for piece in response.iter_content(16 * 1024):
            content += piece
            if len(content) > ANSWER_LIMIT:
                response.close()
                raise errors.ClientError(f"more than {ANSWER_LIMIT} bytes")
        response._content = bytes(content)
        return response


class _NewOrder(messages.NewOrder):
    replaces: str | None = field("replaces", omitempty=True)


@final
class AcmeAuthority(Authority):
    """An authority, and the account that is kept in `store`. The account is made with the first order.

    Args:
        directory: the URL of its directory.
        email: for a new account.
        ca_file: see `AcmeConfig`.
        store: keeps the account.
    """

    def __init__(self, directory: str, *, email: str | None, ca_file: Path | None, store: Store) -> None:
        self._url: Final = directory
        self._host: Final = str(urlsplit(directory).netloc)
        self._email: Final = email
        self._ca_file: Final = ca_file
        self._store: Final = store
        self._retry_after: float | None = None
        self._connected: client.ClientV2 | None = None

    def order(self, name: str, csr: bytes, *, kind: ChallengeKind, replaces: bytes | None) -> Order:
        with self._failures(name, kind, placing=True):
            acme = self._with_account()
            try:
                return self._place(acme, name, csr, kind=kind, replaces=replaces)
            except messages.Error as error:
                if error.code != "accountDoesNotExist":
                    raise
            # It has forgotten the account, as authorities for tests do.
            self._register(acme)
            return self._place(acme, name, csr, kind=kind, replaces=replaces)

    def suggestion(self, certificate: bytes) -> tuple[float | None, float]:
        acme = self._without_account()
        try:
            renew_at, check_at = acme.renewal_time(certificate)
        except (errors.Error, JoseError, ValueError, KeyError, TypeError) as error:
            cause = error.__cause__ or error
            raise OrderFailed(f"{self._host} does not say when to renew: {cause}", scope=Scope.NAME) from error
        least, most = _CHECK_BOUNDS
        again = min(max((check_at - dt.datetime.now()).total_seconds(), least), most)  # noqa: DTZ005  # the library's
        return None if renew_at is None else renew_at.timestamp(), again

    def _place(
        self,
        acme: client.ClientV2,
        name: str,
        csr: bytes,
        *,
        kind: ChallengeKind,
        replaces: bytes | None,
    ) -> Order:
        def post(what: messages.NewOrder | None, url: str) -> requests.Response:
            return acme.net.post(url, what, new_nonce_url=acme.directory["newNonce"])

        wanted = messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name)
        replaced = _certificate_id(replaces) if replaces is not None and _has_ari(acme) else None
        try:
            response = post(_NewOrder(identifiers=[wanted], replaces=replaced), acme.directory["newOrder"])
        except errors.ConflictError:  # it has been replaced before
            response = post(_NewOrder(identifiers=[wanted]), acme.directory["newOrder"])
        body = messages.Order.from_json(response.json())
        authorizations = []
        for url in body.authorizations:
            found = messages.Authorization.from_json(post(None, url).json())
            authorizations.append(messages.AuthorizationResource(body=found, uri=url))
        resource = messages.OrderResource(
            body=body, uri=response.headers["Location"], authorizations=authorizations, csr_pem=csr
        )
        return _AcmeOrder(self, acme, resource, name, kind)

    def _with_account(self) -> client.ClientV2:
        acme = self._without_account()
        if acme.net.account is None:
            self._register(acme)
        return acme

    def _without_account(self) -> client.ClientV2:
        if self._connected is None:
            with self._failures(None, None, placing=True):
                account = self._store.account() or {}
                key = _key_of(account.get("key"))
                network = client.ClientNetwork(
                    key,
                    alg=ES256,
                    user_agent=f"pioneer-tunnel/{__version__}",
                    timeout=REQUEST_TIMEOUT,
                )
                if self._ca_file is not None:
                    network.verify_ssl = str(self._ca_file)  # type: ignore[assignment]  # requests takes a path, too
                network.session.mount("https://", _Bounded())
                del network.session.adapters["http://"]  # RFC 8555, 6.1; also where the authority redirects to
                network.session.max_redirects = MOST_REDIRECTS
                network.session.hooks["response"].append(self._note_retry_after)
                directory = client.ClientV2.get_directory(self._url, network)
                if isinstance(account.get("uri"), str):
                    network.account = messages.RegistrationResource(body=messages.Registration(), uri=account["uri"])
                self._connected = client.ClientV2(directory, network)
        return self._connected

    def _register(self, acme: client.ClientV2) -> None:
        if acme.external_account_required():
            raise OrderFailed(
                f"{self._host} makes accounts for its customers alone (external account binding), which is not"
                " supported here; name another directory",
                scope=Scope.AUTHORITY,
            )
        acme.net.account = None
        wanted = messages.NewRegistration.from_data(email=self._email, terms_of_service_agreed=True)
        try:
            uri = acme.new_account(wanted).uri
        except errors.ConflictError as known:  # it has the key already
            uri = known.location
        acme.net.account = messages.RegistrationResource(body=messages.Registration(), uri=uri)
        assert acme.net.key is not None
        pem = acme.net.key.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._store.keep_account({"uri": uri, "key": pem.decode("ascii")})
        terms = acme.directory["meta"].terms_of_service
        line = "there is an account at %s now; its terms of service: %s"
        _log.info(line, self._host, clean_message(terms or "none"))

    def _note_retry_after(self, response: requests.Response, *_others: Any, **_options: Any) -> None:
        self._retry_after = retry_after_seconds(response.headers.get("Retry-After"))

    @contextmanager
    def _failures(self, name: str | None, kind: ChallengeKind | None, *, placing: bool = False) -> Iterator[None]:
        """Turn the exceptions of the library into `OrderFailed`."""
        self._retry_after = None
        try:
            yield
        except messages.Error as error:
            raise self.refusal(error, name, kind, placing=placing) from error
        except requests.RequestException as error:
            self._connected = None  # it may have moved
            text = f"{self._host} cannot be reached: {_reason(error)}"
            raise OrderFailed(text, scope=Scope.AUTHORITY, retry_after=self._retry_after) from error
        except errors.ClientError as error:
            response = error.args[0] if error.args else None
            status = f"HTTP status {response.status_code}" if isinstance(response, requests.Response) else str(error)
            text = f"{self._host} has answered something else than ACME: {status}"
            raise OrderFailed(text, scope=Scope.AUTHORITY, retry_after=self._retry_after) from error
        except (errors.Error, JoseError, ValueError, KeyError, TypeError) as error:
            text = f"{self._host} has answered something else than ACME: {error}"
            raise OrderFailed(text, scope=Scope.AUTHORITY) from error

    def refusal(
        self, error: messages.Error, name: str | None, kind: ChallengeKind | None, *, placing: bool = False
    ) -> OrderFailed:
        """What a problem document of the authority means."""
        code = str(error.typ).removeprefix(messages.ERROR_PREFIX)
        said = error.detail or error.title or str(error.typ)
        if code == "rateLimited" and name is not None:
            scope = Scope.RATE_LIMIT
        elif code in {"badNonce", "serverInternal"} or (placing and code not in _NAME_CODES):
            scope = Scope.AUTHORITY
        else:
            scope = Scope.NAME
        text = explain(code, f"{self._host} says: {said}", name=name, kind=kind)
        return OrderFailed(text, scope=scope, retry_after=self._retry_after)


@final
class _AcmeOrder(Order):
    def __init__(
        self,
        authority: AcmeAuthority,
        acme: client.ClientV2,
        resource: messages.OrderResource,
        name: str,
        kind: ChallengeKind,
    ) -> None:
        self._authority: Final = authority
        self._acme: Final = acme
        self._resource = resource
        self._name: Final = name
        self._kind: Final = kind
        self._finalized = False
        assert acme.net.key is not None
        self._key: Final = acme.net.key
        self._pending: Final = [one for one in resource.authorizations if one.body.status == messages.STATUS_PENDING]
        self._wanted: Final = [self._challenge_of(one) for one in self._pending]

    def _challenge_of(self, authorization: messages.AuthorizationResource) -> messages.ChallengeBody:
        offered = authorization.body.challenges
        for challenge in offered:
            if challenge.chall.typ == self._kind:
                return challenge
        others = ", ".join(str(challenge.chall.typ) for challenge in offered)
        raise OrderFailed(f"the authority offers {others} for this name, and not {self._kind}", scope=Scope.NAME)

    @property
    def challenges(self) -> tuple[Challenge, ...]:
        return tuple(
            Challenge(self._name, self._kind, one.chall.encode("token"), one.chall.key_authorization(self._key))
            for one in self._wanted
        )

    def begin_validation(self) -> None:
        with self._authority._failures(self._name, self._kind):
            for challenge in self._wanted:
                self._acme.answer_challenge(challenge, challenge.chall.response(self._key))

    def is_validated(self) -> bool:
        with self._authority._failures(self._name, self._kind):
            for authorization in self._pending:
                found, _ = self._acme.poll(authorization)
                if found.body.status == messages.STATUS_PENDING:
                    return False
                if found.body.status != messages.STATUS_VALID:
                    raise self._why_invalid(found)
        return True

    def _why_invalid(self, authorization: messages.AuthorizationResource) -> OrderFailed:
        for challenge in authorization.body.challenges:
            if challenge.error is not None:
                return self._authority.refusal(challenge.error, self._name, self._kind)
        return OrderFailed("the authority has not accepted the name, and does not say why", scope=Scope.NAME)

    def certificate(self) -> bytes | None:
        with self._authority._failures(self._name, self._kind):
            if not self._finalized:
                self._acme.begin_finalization(self._resource)
                self._finalized = True
            order = messages.Order.from_json(self._get(self._resource.uri).json())
            if order.status == messages.STATUS_INVALID:
                raise self._authority.refusal(order.error or messages.Error(), self._name, self._kind)
            if order.status != messages.STATUS_VALID or order.certificate is None:
                return None
            return self._get(order.certificate).text.encode("ascii")

    def _get(self, url: str) -> requests.Response:
        return self._acme.net.post(url, None, new_nonce_url=self._acme.directory["newNonce"])


def _key_of(pem: object) -> JWKEC:
    """The account's key; a new one if there is none.

    Raises:
        ValueError: it is damaged.
    """
    key = (
        serialization.load_pem_private_key(pem.encode("ascii"), None)
        if isinstance(pem, str)
        else ec.generate_private_key(ec.SECP256R1())
    )
    return JWKEC(key=key)


def _has_ari(acme: client.ClientV2) -> bool:
    return "renewalInfo" in acme.directory.to_partial_json()


def _certificate_id(certificate: bytes) -> str | None:
    """The name of a certificate in an order (RFC 9773, 4.1); None if it has none."""
    leaf = x509.load_pem_x509_certificate(certificate)
    try:
        authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return None
    if authority is None:
        return None
    serial = leaf.serial_number
    number = serial.to_bytes(serial.bit_length() // 8 + 1)
    return f"{b64encode(authority).decode()}.{b64encode(number).decode()}"


def _reason(error: BaseException) -> str:
    """The innermost reason; those around it repeat it, and it begins with the object that has failed."""
    inner = error.args[0] if error.args else None
    inner = getattr(inner, "reason", inner)
    text = str(inner if isinstance(inner, BaseException) else error)
    return text.removeprefix(found[0]) if (found := _OBJECT.match(text)) else text

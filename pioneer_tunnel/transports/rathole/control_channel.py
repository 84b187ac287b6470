"""The transports `tcp` and `tls`, for Pioneer Relay and rathole: a control channel, and a connection for each visitor.

A tunnel has one control channel. Its opening is dial, hello, nonce, proof, ack; each step has a deadline. Then the
relay asks on it for data channels: a few in advance and one for each visitor. A data channel is a connection of its
own. When the relay says so, it becomes the visitor's connection, byte for byte. The protocol does not tell the
visitor's address, and the gateway sends nothing on the control channel.

Data channels go to the IP address that the control channel reached. The relay's name may stand for several machines,
and only this one knows the session. With a proxy this is the proxy's address, and which machine it reaches is up to it.

When the control channel ends, all visitors' connections are reset. They could outlive it, but nothing of a transport
outlives the call of it, and a gateway whose status is `reconnecting` must not go on serving. A RST, unlike a FIN, never
looks like a complete answer.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, final

import attrs
import trio

from ..._model.addresses import Address
from ..._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RemoteProtocolError,
    TunnelAuthError,
)
from ..._model.exception_groups import lone_error_bare
from ..._model.keys import RelayKey
from ..._model.log_fields import about
from ..._net.adopted import Watched
from ..._net.dialing import Dialer, dial_relay, dial_tcp
from ..._net.lent_socket import LentSocket
from ..._net.socket_options import keep_alive
from ..._net.tls.client import client_tls, why_alerted
from ..interface import IN_CLEAR, TLS_OF_RATHOLE, Deliver, Report, Session, Target, usable_key
from ..link_checks import LinkChecks
from .codec import Ack, Challenge, ChannelKind, ControlChannel, ControlCommand, ControlEvent, Hello, OtherVersionError
from .data_channels import DataChannels, staying
from .key_mode import KeyMode

__all__ = ["RatholeTransport", "failures_named", "hear"]

HEARTBEAT_TIMEOUT: Final = 40.0
"""Seconds of silence on the control channel after which the relay is dead. A relay beats every 30 seconds or more."""

CHECK_TIMEOUT: Final = 3.0
"""Seconds that a check of the link takes. TCP breaks the connection after two of them."""

_READ_SIZE: Final = 4 * 1024

_log: Final = logging.getLogger("pioneer_tunnel.transports.pioneer_relay")


@final
@attrs.frozen(kw_only=True)
class RatholeTransport:
    """The transports `tcp` and `tls`.

    Attributes:
        tls: whether each connection is inside TLS. In clear, everyone on the way can read what visitors send.
        key_mode: how the relay knows the key.
        max_streams: visitors' connections that may be open at once.
    """

    tls: bool = False
    key_mode: KeyMode = KeyMode.TOKEN_ROUTING
    max_streams: int = 4096

    def check(self, key: RelayKey | None) -> RelayKey:
        """See `BuiltInTransport`."""
        return usable_key(key, native=False)

    async def __call__(
        self,
        target: Target,
        deliver: Deliver,
        report: Report,  # noqa: ARG002  # this protocol has no events
        *,
        task_status: trio.TaskStatus[Session],
    ) -> NoReturn:
        """See `Serve`."""
        self.check(target.key)
        address, timeout, make_tls = target.address, target.connect_timeout, target.make_tls or client_tls
        via = await target.redial.via(target.proxy, make_tls, address, timeout=timeout)
        tls = await target.redial.tls(make_tls, address, timeout=timeout) if self.tls else None
        dial = target.redial.dialer(target.dial, timeout=timeout)
        stream, watched = await dial_relay(
            address, dial=dial, tls=tls, timeout=timeout, via=via, resumption=target.redial.resumption
        )
        try:
            connected = watched.lowest_socket
            if connected is not None:
                keep_alive(connected.socket)
            channel = ControlChannel(self.key_mode.id(target.key, target.service))
            proof, early = await _open(channel, stream, target, self.key_mode)
            with lone_error_bare(), staying(tls) as stay:
                async with trio.open_nursery() as nursery:
                    channels = DataChannels(
                        target,
                        Hello(ChannelKind.DATA, proof).encode(),
                        machine=_machine_reached(watched, target.dial),
                        via=via,
                        tls=tls,
                        max_streams=self.max_streams,
                        deliver=deliver,
                        nursery=nursery,
                        stay=stay,
                    )
                    if connected is not None:
                        nursery.start_soon(_check_when_asked, target.checks, connected)
                    task_status.started(Session(drain=channels.drain))
                    if tls is None:
                        fields = about("in_clear", peer=address)
                        _log.warning(IN_CLEAR, address, TLS_OF_RATHOLE, extra=fields)
                    try:
                        await _obey(channel, early, stream, channels, target)
                    finally:
                        await channels.end()
            raise AssertionError("a control channel ends by raising")
        finally:
            # The protocol has no goodbye, and nothing is queued.
            await trio.aclose_forcefully(stream)


async def _open(
    channel: ControlChannel, stream: trio.abc.Stream, target: Target, key_mode: KeyMode
) -> tuple[bytes, list[ControlEvent]]:
    """The opening; returns the proof, and the events that came with the ack."""
    with failures_named(channel, target):
        with trio.fail_after(target.connect_timeout):
            await stream.send_all(channel.hello)
        challenge, *events = await hear(channel, stream, target.connect_timeout)
        assert isinstance(challenge, Challenge)
        proof = key_mode.proof(target.key, challenge.nonce)
        if not events:
            # A relay that does not know the service has said so and closed, so the send may fail.
            with trio.fail_after(target.connect_timeout), suppress(trio.BrokenResourceError):
                await stream.send_all(channel.prove(proof))
            events = await hear(channel, stream, target.connect_timeout)
    ack, *early = events
    if ack is Ack.SERVICE_NOT_EXIST:
        raise _unknown_service(target, key_mode)
    if ack is Ack.AUTH_FAILED:
        raise TunnelAuthError(
            f"the relay at {target.address} rejected the key for the service {target.service!r} (key mode {key_mode})"
        )
    return proof, early


async def hear(channel: ControlChannel, stream: trio.abc.Stream, timeout: float) -> list[ControlEvent]:
    """Wait for the next events, at least one."""
    with trio.fail_after(timeout):
        while True:
            data = await stream.receive_some(_READ_SIZE)
            if not data:
                raise trio.BrokenResourceError("it closed the connection")
            if events := channel.receive(data):
                return events


def _unknown_service(target: Target, mode: KeyMode) -> InvalidSettingsError:
    address, service = target.address, target.service
    if mode.by_name:
        return InvalidSettingsError(
            f"the relay at {address} does not know the service {service!r} (key mode {mode}): service_name has to be"
            " the name that the relay's operator gave it",
            rejection=True,
        )
    return InvalidSettingsError(
        f"the relay at {address} does not know our key, with the service {service!r} (key mode {mode}): either it is"
        " another key than the relay's operator registered, or the relay finds services by name, and key_mode has to"
        " be token_hash or rathole",
        rejection=True,
    )


@contextmanager
def failures_named(channel: ControlChannel, target: Target) -> Iterator[None]:
    """Turn the failure of an opening into a `TunnelError` that says what a person can do."""
    address = target.address
    try:
        yield
    except trio.TooSlowError:
        raise RelayConnectError(
            f"{address} did not say {channel.waits_for} within {target.connect_timeout:g} seconds"
        ) from None
    except OtherVersionError as error:
        raise RelayConnectError(f"{address} cannot be talked to: {error}", retry_slowly=True) from error
    except RemoteProtocolError as error:
        raise RelayConnectError(f"{address} is not a Pioneer relay or rathole: {error}") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        raise RelayConnectError(
            f"{address} broke off the opening before it had said {channel.waits_for}:"
            f" {why_alerted(error, address.host) or error}"
        ) from error


async def _obey(
    channel: ControlChannel,
    events: list[ControlEvent],
    stream: trio.abc.Stream,
    channels: DataChannels,
    target: Target,
) -> NoReturn:
    """Open the data channels that the relay asks for, until the control channel ends."""
    address = target.address
    try:
        with trio.fail_after(HEARTBEAT_TIMEOUT) as silence:
            while True:
                for event in events:
                    if event is ControlCommand.CREATE_DATA_CHANNEL:
                        channels.want()
                data = await stream.receive_some(_READ_SIZE)
                if not data:
                    raise LinkLostError(f"the relay at {address} closed the control channel")
                # A scope of its own for each message would cost as much as the message.
                silence.deadline = trio.current_time() + HEARTBEAT_TIMEOUT
                events = channel.receive(data)
    except trio.TooSlowError:
        raise LinkLostError(
            f"the relay at {address} was silent for {HEARTBEAT_TIMEOUT:g} seconds, longer than any relay's heartbeat"
        ) from None
    except trio.BrokenResourceError as error:
        in_check = trio.current_time() < target.checks.asked_at + CHECK_TIMEOUT
        raise LinkLostError(f"the link to {address} is lost: {error}", retry_at_once=in_check) from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"the relay at {address} broke a rule of the protocol: {error}") from error


async def _check_when_asked(checks: LinkChecks, connected: LentSocket) -> NoReturn:
    """Make TCP probe the relay's system when a check is asked for; then the connection breaks if nothing answers.

    The relay answers nothing on the control channel, so it cannot be asked itself.
    """
    while True:
        await checks.asked()
        keep_alive(connected.socket, idle=1, interval=1, probes=2)
        await trio.sleep(CHECK_TIMEOUT)
        keep_alive(connected.socket)


def _machine_reached(watched: Watched, dial: Dialer) -> Address | None:
    """The IP address and port that `watched` is connected to.

    None with a dialer of the host's own: what it connects to may be a proxy, so data channels dial the name.
    """
    lowest = watched.lowest_socket
    if dial is not dial_tcp or lowest is None:
        return None
    connected = lowest.socket
    try:
        peer: tuple[Any, ...] = connected.getpeername()
    except OSError:
        return None  # the connection is broken; the next read reports that
    if connected.family == socket.AF_INET6 and peer[3]:
        return None  # an address of one network interface only
    return Address.of_socket(peer)

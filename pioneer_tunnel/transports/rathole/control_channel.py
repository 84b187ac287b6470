"""The transports `tcp` and `tls`: relays that exist, Pioneer Relay and rathole, with a connection for each visitor.

One control channel per tunnel: dial, hello, nonce, proof, ack, each step under a deadline. From then on the relay asks
for data channels on it, a few in advance and one for each visitor. A data channel is a connection of its own, which
turns into the visitor's connection when the relay says so, byte for byte. There is no visitor's address, and no word
for what this end wants: it can only be there, or not.

Data channels go to the very machine that answered the control channel (`_machine_reached`): behind the relay's name
there may be several, and the others do not know this session.

What ends with the control channel: everything. The streams that are being carried have connections of their own and
could outlive it, but nothing of a transport outlives `serve` (that is the seam's promise to the supervisor), and a
gateway that was told `reconnecting` should not be serving. So they end with a RST, which no visitor takes for a whole
answer.

Neighbours: `rathole_codec` knows the bytes, `key_mode` what is told of the key; `data_channels` makes the connections
that are asked for.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn

import trio

from ..._model.addresses import Address, RelayAddress
from ..._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RemoteProtocolError,
    TunnelAuthError,
)
from ..._model.exception_groups import lone_error_bare
from ..._net.adopted import Watched
from ..._net.dialing import Dialer, dial_relay, dial_tcp
from ..._net.socket_options import keep_alive
from ..._net.tls.client import client_tls
from ..interface import Deliver, Report, Session, Target
from .codec import Ack, Challenge, ChannelKind, ControlChannel, ControlCommand, ControlEvent, Hello, OtherVersionError
from .data_channels import DataChannels, staying

__all__ = ["serve_tcp", "serve_tls"]

HEARTBEAT_TIMEOUT: Final = 40.0
"""Seconds of silence on the control channel after which the relay is dead. A relay beats every 30 seconds or more."""

_READ_SIZE: Final = 4 * 1024

_log: Final = logging.getLogger("pioneer_tunnel.transports.pioneer_relay")


async def serve_tcp(
    target: Target,
    deliver: Deliver,
    report: Report,  # noqa: ARG001  # this protocol has nothing to report
    *,
    task_status: trio.TaskStatus[Session],
) -> NoReturn:
    """In clear: whoever can listen on the way reads what visitors send, their tokens included. See `Serve`."""
    await _serve(target, deliver, None, task_status)


async def serve_tls(
    target: Target,
    deliver: Deliver,
    report: Report,  # noqa: ARG001  # this protocol has nothing to report
    *,
    task_status: trio.TaskStatus[Session],
) -> NoReturn:
    """Each connection inside TLS. See `Serve`."""
    tls = await target.redial.tls(target.make_tls or client_tls, target.address, timeout=target.connect_timeout)
    await _serve(target, deliver, tls, task_status)


async def _serve(
    target: Target, deliver: Deliver, tls: ssl.SSLContext | None, task_status: trio.TaskStatus[Session]
) -> NoReturn:
    address = target.address
    dial = target.redial.dialer(target.dial, timeout=target.connect_timeout)
    stream, watched = await dial_relay(address, dial=dial, tls=tls, timeout=target.connect_timeout)
    try:
        connected = watched.lowest_socket
        if connected is not None:
            keep_alive(connected.socket)
        channel = ControlChannel(target.key_mode.id(target.key, target.service))
        proof, early = await _open(channel, stream, target)
        with lone_error_bare(), staying(tls) as stay:
            async with trio.open_nursery() as nursery:
                hello = Hello(ChannelKind.DATA, proof).encode()
                channels = DataChannels(
                    target,
                    hello,
                    machine=_machine_reached(watched, target.dial),
                    tls=tls,
                    deliver=deliver,
                    nursery=nursery,
                    stay=stay,
                )
                task_status.started(Session())
                if tls is None:
                    _log.warning(
                        "%s is reached in clear: on the way, visitors' traffic and tokens can be read", address
                    )
                try:
                    await _obey(channel, early, stream, channels, address)
                finally:
                    await channels.end()
        raise AssertionError("a control channel ends by raising")
    finally:
        # There is no goodbye in this protocol, and nothing is queued.
        await trio.aclose_forcefully(stream)


async def _open(channel: ControlChannel, stream: trio.abc.Stream, target: Target) -> tuple[bytes, list[ControlEvent]]:
    """Come to terms with the relay; returns the proof, and what the relay has said beyond that."""
    with _failures_named(channel, target):
        with trio.fail_after(target.connect_timeout):
            await stream.send_all(channel.hello)
        challenge, *events = await _hear(channel, stream, target.connect_timeout)
        assert isinstance(challenge, Challenge)
        proof = target.key_mode.proof(target.key, challenge.nonce)
        if not events:
            # A relay that does not know the service has said so, and is gone before it reads this.
            with trio.fail_after(target.connect_timeout), suppress(trio.BrokenResourceError):
                await stream.send_all(channel.prove(proof))
            events = await _hear(channel, stream, target.connect_timeout)
    ack, *early = events
    if ack is Ack.SERVICE_NOT_EXIST:
        raise _unknown_service(target)
    if ack is Ack.AUTH_FAILED:
        raise TunnelAuthError(
            f"the relay at {target.address} rejected the key for the service {target.service!r}"
            f" (key mode {target.key_mode})"
        )
    return proof, early


async def _hear(channel: ControlChannel, stream: trio.abc.Stream, timeout: float) -> list[ControlEvent]:
    """What the relay says next, one thing at least."""
    with trio.fail_after(timeout):
        while True:
            data = await stream.receive_some(_READ_SIZE)
            if not data:
                raise trio.BrokenResourceError("it closed the connection")
            if events := channel.receive(data):
                return events


def _unknown_service(target: Target) -> InvalidSettingsError:
    address, service, mode = target.address, target.service, target.key_mode
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
def _failures_named(channel: ControlChannel, target: Target) -> Iterator[None]:
    """Tell what an opening failed of, in terms of what a person can do about it."""
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
            f"{address} broke off the opening before it had said {channel.waits_for}: {error}"
        ) from error


async def _obey(
    channel: ControlChannel,
    events: list[ControlEvent],
    stream: trio.abc.Stream,
    channels: DataChannels,
    address: RelayAddress,
) -> NoReturn:
    """Do what the relay asks for until it is gone."""
    try:
        while True:
            for event in events:
                if event is ControlCommand.CREATE_DATA_CHANNEL:
                    channels.want()
            with trio.fail_after(HEARTBEAT_TIMEOUT):
                data = await stream.receive_some(_READ_SIZE)
            if not data:
                raise LinkLostError(f"the relay at {address} closed the control channel")
            events = channel.receive(data)
    except trio.TooSlowError:
        raise LinkLostError(
            f"the relay at {address} was silent for {HEARTBEAT_TIMEOUT:g} seconds, longer than any relay's heartbeat"
        ) from None
    except trio.BrokenResourceError as error:
        raise LinkLostError(f"the link to {address} is lost: {error}") from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"the relay at {address} broke a rule of the protocol: {error}") from error


def _machine_reached(watched: Watched, dial: Dialer) -> Address | None:
    """The machine that `watched` reaches, whatever the relay's name resolves to by now.

    None when it has to be asked for by name each time: what a dialer of the host's own connects to may be a proxy.
    """
    lowest = watched.lowest_socket
    if dial is not dial_tcp or lowest is None:
        return None
    connected = lowest.socket
    try:
        peer: tuple[Any, ...] = connected.getpeername()
    except OSError:
        return None  # it is broken already, as whoever listens to it finds out
    if connected.family == socket.AF_INET6 and peer[3]:
        return None  # an address of one network interface only
    return Address.of_socket(peer)

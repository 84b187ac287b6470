"""The way to a relay of transport `tcp` or `tls` above TCP and TLS: whether such a relay answers.

Its protocol has no way to prove a key without taking the tunnel from a gateway that runs. So the proof is not sent.
"""

from __future__ import annotations

import trio

from .._model.errors import InvalidSettingsError
from ..transports.rathole.codec import Ack, ControlChannel
from ..transports.rathole.control_channel import failures_named, hear
from ..transports.rathole.key_mode import KeyMode
from .checks import Checks, Name
from .subject import Subject

__all__ = ["check_rathole_link"]

_NO_PROOF = "a proof would take the tunnel from a gateway that runs; this transport has no other way"


async def check_rathole_link(checks: Checks, subject: Subject, stream: trio.abc.Stream, key_mode: KeyMode) -> None:
    """Say hello and wait for the answer, which shows what kind of relay it is. The caller closes `stream`."""
    checks.skip(Name.CAPTIVE_PORTAL, "this transport has no HTTP")
    target = subject.target
    if target is None:
        for name in (Name.UPGRADE, Name.CLOCK, Name.PROOF, Name.MTU):
            checks.skip(name, "no key was given")
        return
    channel = ControlChannel(key_mode.id(target.key, target.service))
    with checks.check(Name.UPGRADE) as finding, failures_named(channel, target):
        with trio.fail_after(target.connect_timeout):
            await stream.send_all(channel.hello)
        _, *early = await hear(channel, stream, target.connect_timeout)
        finding.ok("a relay answers (Pioneer Relay or rathole, version 1)")
    checks.skip(Name.CLOCK, "this transport tells no time")
    if Ack.SERVICE_NOT_EXIST in early:
        with checks.check(Name.PROOF):
            raise InvalidSettingsError("the relay does not know this key, or this service")
    checks.skip(Name.PROOF, _NO_PROOF)
    checks.skip(Name.MTU, "needs a link that counts for nothing, which this transport has not")

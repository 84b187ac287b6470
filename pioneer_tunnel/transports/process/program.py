"""The transport `process`: runs an operator's own tunnel program (frpc, autossh, cloudflared …) and watches it.

It finds the program, writes the files for it, starts it with a guardian, waits until it is connected, and waits until
it ends.

The program connects to the local gateway itself. So `deliver` is never called, and what this library does for a
visitor's stream (PROXY header, handler, count of local failures) is not done. What is known of the tunnel is what the
program prints, whether a probe was answered at the start, and whether the program runs.

The program gets the relay key in a file that only this user can read, on standard input, or in the environment variable
that the operator names; never in its arguments. The key is removed from the output before it is logged or quoted.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn, final

import attrs
import trio

from ..._model.errors import (
    InvalidSettingsError,
    MissingBinaryError,
    ProcessExitedError,
    RelayConnectError,
    StorageError,
    UnsupportedTransportError,
)
from ..._model.exception_groups import lone_error_bare
from ..._model.keys import RelayKey
from ..._model.log_fields import about
from ..._model.proxies import Proxy
from ..._net.tls.client import client_tls
from ..._storage import files
from ..._storage.run_files import name_run_file
from ..interface import Deliver, Report, Session, Target, usable_key
from .config import ProcessConfig, TunnelProgram
from .guarded import Program, StartRefused, guarded
from .guardian import Orders
from .output import Output, Secrets

__all__ = ["ProcessTransport"]

_IS_POSIX: Final = os.name == "posix"
_KEY_WORTH_LOOKING_FOR: Final = 8
"""Characters. A shorter key may occur by chance in arguments and variables, so it is not looked for there."""
_INHERITED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *("SSH_AUTH_SOCK", "SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"),
)
"""Variables of the gateway's environment that every program gets. The others may hold secrets."""
_PROXIES: Final = (
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
"""Variables that a program gets as well, unless the configuration says which proxy to use."""
_NOT_EXECUTABLE: Final = {
    errno.ENOENT: "its interpreter, or a library that it starts with, is not there",
    errno.EACCES: "this user may not execute it",
    errno.EPERM: "this user may not execute it",
    errno.ENOEXEC: "it is no program for this machine, and no script that names its interpreter",
    errno.ENOTDIR: "its path leads through a file",
    errno.ELOOP: "its path leads in circles",
    errno.EISDIR: "it is a folder",
}

_log: Final = logging.getLogger("pioneer_tunnel.transports.process")


@final
@attrs.frozen(kw_only=True)
class ProcessTransport:
    """The transport `process`.

    Attributes:
        program: the tunnel program. The transport cannot work without one.
    """

    program: TunnelProgram | None = None

    def check(self, key: RelayKey | None) -> RelayKey:
        """See `BuiltInTransport`. The system and the program are checked before the key."""
        _refuse_unguarded()
        if self.program is None:
            raise InvalidSettingsError(
                "transport 'process' runs a tunnel program, and none is configured; name it as command in the table"
                " [gateway.remote_access.process]"
            )
        return usable_key(key, native=False)

    async def __call__(
        self,
        target: Target,
        deliver: Deliver,  # noqa: ARG002  # visitors do not come this way
        report: Report,  # noqa: ARG002  # nor events about them
        *,
        task_status: trio.TaskStatus[Session],
    ) -> NoReturn:
        """See `Serve`. Neither `deliver` nor `report` is called."""
        self.check(target.key)
        program = self.program
        assert program is not None
        config, secrets = program.config, Secrets(target.key)
        proxy = await _configured_proxy(target)
        output = Output(config.connected_pattern, Secrets(target.key, None if proxy is None else proxy.credentials))
        run = _Run.plan(program, target, proxy)
        try:
            await trio.to_thread.run_sync(run.write_files, target.key)
            orders = await trio.to_thread.run_sync(run.orders, target.key, secrets)
            name = secrets.hide(Path(orders["program"]).name)
            typed = memoryview(target.key.reveal().encode() + b"\n") if config.key_on_stdin else None
            try:
                with lone_error_bare():
                    async with guarded(orders, typed=typed, output=output, log=_log) as running:
                        await _watch(running, name, config, target, task_status)
            except StartRefused as refusal:
                raise _refused(refusal, orders) from refusal
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(run.remove_files)
        raise AssertionError("a program was left without a reason")


async def _configured_proxy(target: Target) -> Proxy | None:
    """The configuration's proxy with its credentials; that of the environment is for the program to find."""
    if not isinstance(target.proxy.configured, Proxy):
        return None
    make_tls = target.make_tls or client_tls
    via = await target.redial.via(target.proxy, make_tls, target.address, timeout=target.connect_timeout)
    return None if via is None else via.proxy


def _refuse_unguarded() -> None:
    """Do nothing where a guardian can keep a program from outliving us.

    Raises:
        UnsupportedTransportError: this system, or this Python, cannot do that.
    """
    if not _IS_POSIX:
        raise UnsupportedTransportError(
            "the transport 'process' needs the process groups of Linux, macOS or another POSIX system;"
            " on this one, run the tunnel program as a service of its own"
        )
    if not sys.executable or getattr(sys, "frozen", False):
        raise UnsupportedTransportError(
            "the transport 'process' needs a Python interpreter for the guardian of its program, and this gateway was"
            " built without one; run the tunnel program as a service of its own"
        )


async def _watch(
    program: Program, name: str, config: ProcessConfig, target: Target, task_status: trio.TaskStatus[Session]
) -> NoReturn:
    """Wait until the program is connected, report that, and wait until it ends."""
    timeout = config.startup_timeout_ms / 1000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fail_when_ended, program, name)
        probe = _Probe(config, target)
        with trio.move_on_after(timeout) as starting:
            await _until_connected(program, config, probe)
        if starting.cancelled_caught:
            said = program.newest_words
            raise RelayConnectError(
                f"the tunnel program {name!r} is not connected after {timeout:g} seconds: {_missed(config, probe)}"
                f"{f'; it says: {said}' if said else ''}"
            )
        task_status.started(Session(public_url=None if config.public_url is None else str(config.public_url)))
        # No deadline: `_fail_when_ended` ends this.
        await trio.sleep_forever()
    raise AssertionError("a nursery has ended while its task goes on")


async def _until_connected(program: Program, config: ProcessConfig, probe: _Probe) -> None:
    if config.connected_pattern is None and config.probe_url is None:
        await trio.sleep(config.settle_ms / 1000)
        return
    async with trio.open_nursery() as nursery:
        if config.probe_url is not None:
            nursery.start_soon(probe.until_answered, nursery.cancel_scope)
        # No deadline: the caller has one. Without a pattern this is never set.
        await program.matched.wait()
        nursery.cancel_scope.cancel()


def _missed(config: ProcessConfig, probe: _Probe) -> str:
    missed = []
    if config.connected_pattern is not None:
        missed.append("no line of its output matches connected_pattern")
    if config.probe_url is not None:
        missed.append(f"probe_url: {probe.last}")
    return "; ".join(missed)


async def _fail_when_ended(program: Program, name: str) -> NoReturn:
    # No deadline: a program may run forever.
    await program.ended.wait()
    said = await program.last_words()
    raise ProcessExitedError(f"the tunnel program {name!r} {_how(program.status)}{f', saying: {said}' if said else ''}")


def _how(status: int | None) -> str:
    if status is None:
        return "ended together with its guardian, which somebody has killed"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _refused(refusal: StartRefused, orders: Orders) -> Exception:
    if refusal.about_folder:
        return InvalidSettingsError(f"the tunnel program cannot be started in the folder {orders['folder']}: {refusal}")
    if refusal.errno in _NOT_EXECUTABLE:
        return MissingBinaryError(
            f"the tunnel program {orders['program']} cannot be executed: {_NOT_EXECUTABLE[refusal.errno]}"
        )
    return ProcessExitedError(f"the tunnel program {orders['program']} cannot be started: {refusal}")


@final
class _Probe:
    """Asks `probe_url` until it answers.

    Attributes:
        last: the newest result, in words.
    """

    def __init__(self, config: ProcessConfig, target: Target) -> None:
        self.last = "was not answered in time"
        self._config: Final = config
        self._target: Final = target

    async def until_answered(self, waiting: trio.CancelScope) -> None:
        """Cancel `waiting` at the first answer that counts."""
        from .http_probe import ask_for_status  # noqa: PLC0415  # h11 is imported only when it is used

        config, target = self._config, self._target
        assert config.probe_url is not None
        while True:
            answer = await ask_for_status(
                config.probe_url,
                dial=target.dial,
                make_tls=target.make_tls or client_tls,
                timeout=target.connect_timeout,
                proxy=target.proxy,
                redial=target.redial,
            )
            if isinstance(answer, int) and (not config.probe_statuses or answer in config.probe_statuses):
                waiting.cancel()
                return
            self.last = answer if isinstance(answer, str) else f"answers with HTTP status {answer}"
            await trio.sleep(config.probe_interval_ms / 1000)


@final
@attrs.frozen
class _Run:
    """One run of the program: its files, and the values of its placeholders. Methods block: call them in a thread."""

    program: TunnelProgram
    values: Mapping[str, str]
    key_file: Path | None
    config_file: Path | None
    proxy: Proxy | None
    inherited: Sequence[str]

    @classmethod
    def plan(cls, program: TunnelProgram, target: Target, proxy: Proxy | None) -> _Run:
        config, folder = program.config, program.runtime_folder
        key_file = name_run_file(folder, "key") if config.uses_key_file else None
        config_file = None if config.config_template is None else name_run_file(folder, "conf")
        values = {
            "relay": str(target.address),
            "relay_host": target.address.host,
            "relay_port": str(target.address.port),
            "local": str(program.local),
            "local_host": program.local.host,
            "local_port": str(program.local.port),
            "service": target.service,
            "runtime_dir": str(folder),
            "key_file": "" if key_file is None else str(key_file),
            "config": "" if config_file is None else str(config_file),
            "proxy": "" if proxy is None else str(proxy),
        }
        own_proxy = target.proxy.configured is not None
        return cls(program, values, key_file, config_file, proxy, _INHERITED if own_proxy else _INHERITED + _PROXIES)

    def write_files(self, key: RelayKey) -> None:
        """Write the files for the program.

        Raises:
            StorageError: a file cannot be written.
        """
        if self.key_file is not None or self.config_file is not None:
            files.make_private_folder(self.program.runtime_folder)
        if self.key_file is not None:
            files.replace(self.key_file, memoryview(key.reveal().encode() + b"\n"), private=True)
        if self.config_file is not None:
            template = self.program.config.config_template
            assert template is not None
            secrets = {
                "key": key.reveal(),
                "proxy_with_credentials": "" if self.proxy is None else self.proxy.url_with_credentials,
            }
            text = memoryview(template.fill({**self.values, **secrets}).encode())
            files.replace(self.config_file, text, private=True)

    def remove_files(self) -> None:
        """Remove the files. What cannot be removed now is removed before the next run of the gateway."""
        for path in self._files():
            try:
                files.remove(path)
            except StorageError as error:
                fields = about("file_left_behind", reason=error)
                _log.warning("a file of the tunnel program is left behind: %s", error, extra=fields)

    def orders(self, key: RelayKey, secrets: Secrets) -> Orders:
        """The orders for the guardian.

        Raises:
            MissingBinaryError: there is no such program.
            InvalidSettingsError: its arguments would show the key.
        """
        config = self.program.config
        arguments = [word.fill(self.values) for word in config.command]
        searched = len(key.reveal()) >= _KEY_WORTH_LOOKING_FOR
        if searched and any(secrets.are_in(word) for word in arguments):
            raise InvalidSettingsError(
                "the relay key itself is among the arguments of the tunnel program, which everybody on this machine can"
                " read; take it out of command, and let the program read '{key_file}' or a '{config}'"
            )
        environment = {
            name: os.environ[name]
            for name in (*self.inherited, *config.inherit)
            # The key may be in a variable for the gateway. The program gets it only as the operator says.
            if name in os.environ and not (searched and secrets.are_in(os.environ[name]))
        }
        environment |= {name: text.fill(self.values) for name, text in config.environment}
        if config.key_variable is not None:
            environment[config.key_variable] = key.reveal()
        return Orders(
            program=_find(arguments[0], environment.get("PATH", os.defpath), self.program.folder),
            arguments=arguments,
            environment=environment,
            folder=str(self.program.folder),
            grace=config.stop_grace_ms / 1000,
            leftovers=[str(path) for path in self._files()],
        )

    def _files(self) -> list[Path]:
        return [path for path in (self.key_file, self.config_file) if path is not None]


def _find(name: str, search_path: str, folder: Path) -> str:
    """The path of the program.

    Raises:
        MissingBinaryError: there is none, or it may not be executed.
    """
    if "/" in name:
        path = folder / name
        if not path.exists():
            raise MissingBinaryError(f"the tunnel program {path} is not there")
        if path.is_dir():
            raise MissingBinaryError(f"the tunnel program {path} is a folder")
        if not os.access(path, os.X_OK):
            raise MissingBinaryError(f"the tunnel program {path} is not executable by this user; run: chmod +x {path}")
        return str(path)
    found = [Path(place or ".").absolute() / name for place in search_path.split(os.pathsep)]
    found = [path for path in found if path.is_file()]
    for path in found:
        if os.access(path, os.X_OK):
            return str(path)
    if found:
        raise MissingBinaryError(f"the tunnel program {found[0]} is not executable by this user")
    raise MissingBinaryError(
        f"the tunnel program {name!r} is not installed; install it, or write its path in command."
        f" It was looked for in {search_path}"
    )

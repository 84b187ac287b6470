"""`relay init`: three questions, and the files of a new relay."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

import click

from .._model.addresses import Address, RelayAddress, is_loopback, normal_audience
from .._model.errors import TunnelError
from .._model.keys import SigningIdentity
from .._net.tls.certificate import Certificate
from ..relay.administration.check import check_file
from ..relay.administration.for_gateways import relay_url
from ..relay.administration.new_relay import TERMS, CertificateFiles, NewRelay, Tls, write_new_relay
from ..relay.administration.unit import is_user
from ..relay.config import RelayConfig
from .arguments import Choice, Command, ExistingFile
from .relay_check import show_findings
from .relay_options import USUAL_CONFIG, errors_name

__all__ = ["init"]

_T = TypeVar("_T")
_FILES: Final = "files"
_MODES: Final = {
    _FILES: "with TLS: you have a certificate, as two PEM files",
    "acme": f"with TLS: certificates of Let's Encrypt, whose terms you accept by this: {TERMS}",
    "proxy": "through a proxy on this host, which ends TLS",
    "none": "without TLS: for a test, or inside another tunnel",
}
_SERVICE_USER: Final = "pioneer-tunnel"


@click.command(cls=Command, short_help="Make the files of a new relay.")
@click.option(
    "--host", metavar="NAME", help="Question 1: the name by which gateways dial the relay, with :PORT if unusual."
)
@click.option("--tls", type=Choice([*_MODES]), help="Question 2: how visitors and gateways reach it.")
@click.option(
    "--tls-certificate", type=ExistingFile(), metavar="FILE", help="The certificate chain, PEM (--tls files)."
)
@click.option("--tls-private-key", type=ExistingFile(), metavar="FILE", help="Its private key, PEM (--tls files).")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Question 3: where the files go.")
@click.option("--listen", metavar="HOST:PORT", help="Where the relay listens; by default it follows from the rest.")
@click.option("--user", help="As whom systemd runs the relay; by default you, or pioneer-tunnel if you are root.")
@click.option("--replace", is_flag=True, help="Replace files that exist, except for the identity.")
@click.option("--yes", is_flag=True, help="Ask nothing: options and defaults are the answers.")
def init(  # noqa: PLR0917  # click passes them by name
    host: str | None,
    tls: str | None,
    tls_certificate: Path | None,
    tls_private_key: Path | None,
    folder: Path | None,
    listen: str | None,
    user: str | None,
    replace: bool,
    yes: bool,
) -> None:
    """Make the files of a new relay: relay.toml, the key of its identity, and a unit for systemd.

    It asks three questions; an option answers each of them in advance. No file is replaced unless you say so, and the
    identity never.

    \b
    Examples:
      pioneer-tunnel relay init
      pioneer-tunnel relay init --yes --host relay.example.com \\
          --tls-certificate fullchain.pem --tls-private-key privkey.pem
      pioneer-tunnel relay init --yes --host relay.example.com --tls acme
      pioneer-tunnel relay init --yes --host localhost:7300 --tls none --folder .
    """
    public_name = _answer(host, "--host", "Name of the relay", _public_name, default=None, yes=yes)
    ends = _tls(tls, tls_certificate, tls_private_key, local=is_loopback(_host(public_name)), yes=yes)
    where = _answer(
        None if folder is None else str(folder), "--folder", "Folder for its files", Path, default=_folder(), yes=yes
    )
    with errors_name({}):
        try:
            new = NewRelay(
                public_name=public_name,
                tls=ends,
                folder=where,
                listen=None if listen is None else Address.parse(listen),
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        may_replace = replace or _may_replace(new, yes=yes)
        service_user = _user(user)
        config, identity = write_new_relay(new, program=_program(), user=service_user, replace=may_replace)
        click.echo(f"wrote {new.config_path}, {new.identity_path.name} and {new.unit_path.name}")
        found = check_file(new.config_path)
    if found:
        show_findings(new.config_path, found)
    _tell(new, config, identity, user=service_user)


def _answer(
    given: str | None, option: str, question: str, read: Callable[[str], _T], *, default: str | None, yes: bool
) -> _T:
    """The answer to a question: of an option, the default with `--yes`, or what the user types."""

    def convert(text: str) -> _T:
        try:
            return read(text)
        except (ValueError, TunnelError) as error:
            raise click.BadParameter(str(error), param_hint=option) from None

    if given is not None:
        return convert(given)
    if yes:
        if default is None:
            raise click.UsageError(f"{option} is missing, and --yes asks nothing")
        return convert(default)
    try:
        answer: _T = click.prompt(question, default=default, value_proc=convert)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(f"nobody answers the question; give {option}") from None
    return answer


def _public_name(text: str) -> str:
    return RelayAddress.parse(text).audience if "://" in text else normal_audience(text)


def _host(public_name: str) -> str:
    return RelayAddress.parse(f"wss://{public_name}").host


def _tls(mode: str | None, certificate: Path | None, private_key: Path | None, *, local: bool, yes: bool) -> Tls:
    has_file = certificate is not None or private_key is not None
    if mode not in {None, _FILES} and has_file:
        raise click.UsageError(f"--tls-certificate and --tls-private-key are for --tls {_FILES}")
    if mode is None and not has_file:
        if not yes:
            click.echo("How do visitors and gateways reach it?")
            for name, meaning in _MODES.items():
                click.echo(f"  {name:<6} {meaning}")
        mode = _answer(None, "--tls", "Choose", _mode, default="none" if local else _FILES, yes=yes)
    if mode in {"acme", "proxy", "none"}:
        return cast('Literal["acme", "proxy", "none"]', mode)

    def readable(text: str) -> Path:
        if not Path(text).is_file():
            raise ValueError(f"there is no file {text}")
        return Path(text)

    def key_of_certificate(text: str) -> Path:
        Certificate(chain, readable(text))
        return Path(text)

    chain = _answer(
        None if certificate is None else str(certificate),
        "--tls-certificate", "Certificate with its chain, a PEM file", readable, default=None, yes=yes,
    )  # fmt: skip
    key = _answer(
        None if private_key is None else str(private_key),
        "--tls-private-key", "Its private key, a PEM file", key_of_certificate, default=None, yes=yes,
    )  # fmt: skip
    return CertificateFiles(chain, key)


def _mode(text: str) -> str:
    if text not in _MODES:
        raise ValueError(f"allowed are {', '.join(_MODES)}")
    return text


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _folder() -> str:
    return str(USUAL_CONFIG.parent) if _is_root() else "."


def _user(given: str | None) -> str:
    if given is None:
        try:
            given = _SERVICE_USER if _is_root() else getpass.getuser()
        except (OSError, KeyError, ImportError):  # the system does not know this user, or knows no users
            given = _SERVICE_USER
    if not is_user(given):
        raise click.BadParameter("it is not the name of a user", param_hint="--user")
    return given


def _program() -> list[str]:
    script = Path(sys.executable).with_name("pioneer-tunnel")
    return [str(script)] if script.exists() else [sys.executable, "-m", "pioneer_tunnel"]


def _may_replace(new: NewRelay, *, yes: bool) -> bool:
    """Ask for each file that exists whether it may be replaced."""
    there = [path for path in (new.config_path, new.unit_path) if path.exists()]
    for path in there:
        if yes:
            raise click.ClickException(f"{path} exists already; --replace replaces it. Nothing was written")
        lost = ", and lose the tunnels in it" if path == new.config_path else ""
        if not click.confirm(f"{path} exists already. Replace it{lost}?"):
            raise click.ClickException("nothing was written")
    return bool(there)


def _tell(new: NewRelay, config: RelayConfig, identity: SigningIdentity, *, user: str) -> None:
    file = shlex.quote(str(new.config_path))
    steps = []
    if not is_loopback(new.dialled.host):
        steps.append(
            f"DNS: {new.dialled.host} and the names of the tunnels, such as *.{new.dialled.host}, lead to this host."
        )
    if new.http_address is not None:
        steps.append(
            f"Certificates: ports {new.http_address.port} and {new.address.port} of this host can be reached from the"
            " Internet, and the extra acme is installed.\n"
            "   For a first try, take the '#' from the line 'directory' in the file."
        )
    if new.tls == "proxy":
        steps.append(
            f"The proxy passes everything for these names to {new.address}, WebSockets too, with the Host as it is."
            " It adds to X-Forwarded-For and sets X-Forwarded-Proto."
        )
    steps += [
        f"Add a tunnel:\n   pioneer-tunnel relay add NAME --config {file}",
        f"Run the relay:\n   pioneer-tunnel relay --config {file}",
    ]
    reads = (
        f"\n   ({user} has to be able to read {new.tls.private_key})" if isinstance(new.tls, CertificateFiles) else ""
    )
    if _is_root():
        steps[-1] += (
            f"\n   or as {user} with systemd:\n"
            f"   useradd --system --no-create-home {user}; chown -R {user}: {shlex.quote(str(new.folder))}{reads}\n"
            f"   cp {shlex.quote(str(new.unit_path))} /etc/systemd/system/\n"
            f"   systemctl daemon-reload; systemctl enable --now {new.unit_path.stem}"
        )
    else:
        steps[-1] += f"\n   or with systemd: {new.unit_path} says how."
    click.echo("\nNext:")
    for number, step in enumerate(steps, 1):
        click.echo(f"{number}. {step}")
    click.echo(
        f"\nThe user of a gateway needs a key and the command for it, which 'relay add' prints. In it are\n"
        f"   the relay's address: {relay_url(config)}\n"
        f"   its identity:        {identity.public_key}"
    )

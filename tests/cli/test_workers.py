"""`relay --workers N` as an operator runs it: real processes that are killed, replaced, reloaded and stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from click.testing import CliRunner
from programs import KEY, Program, Relay, relay_in, run, running
from restart_trial import Load, disturb_under_load
from rig import HANG, wait_until

from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel.cli.commands import pioneer_tunnel

LISTENS: Final = r"worker {}, process (\d+), listens"

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="it looks at processes in /proc")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(HANG)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that systemd makes for a service."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    return folder


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with relay_in(tmp_path, workers=2) as started:
        yield started


@contextmanager
def exposed(relay: Relay, local: str) -> Iterator[Program]:
    """A gateway that is connected."""
    with running("expose", local, "--relay", relay.url, "--key-file", relay.folder / "key") as gateway:
        gateway.wait_for("connected .*http://office.test")
        yield gateway
        assert gateway.interrupt(signal.SIGTERM) == 0


def pid_of(relay: Relay, worker: int) -> int:
    """The process of a worker, as the log says it last."""
    relay.program.wait_for(LISTENS.format(worker))
    return int(re.findall(LISTENS.format(worker), relay.program.err.decode())[-1])


def wait_for_successor(relay: Relay, worker: int, before: int) -> None:
    relay.program.wait_for(rf"(?s)worker {worker}, process {before}, has ended.*worker {worker}, process \d+, listens")


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(rate=20, kept=2, downloads=2, seconds=3.0, before=1.0), id="short"),
        pytest.param(
            Load(rate=50, kept=6, downloads=12, seconds=8.0, before=2.0, restarts=2), id="long", marks=pytest.mark.slow
        ),
        pytest.param(
            Load(rate=20, kept=4, downloads=4, seconds=15.0, before=2.0, restarts=5), id="again", marks=pytest.mark.slow
        ),
    ],
)
async def test_replacing_the_workers_fails_no_request(relay: Relay, load: Load) -> None:
    async def replace(number: int) -> None:
        relay.program.process.send_signal(signal.SIGUSR2)
        said = rf"(?s)(?:all workers are replaced.*?){{{number}}}"
        await trio.to_thread.run_sync(relay.program.wait_for, said)

    before = pid_of(relay, 0), pid_of(relay, 1)
    figures = await disturb_under_load(relay, load, replace)
    assert (figures.failed, figures.kept_failed, figures.downloads_failed) == ([], [], [])
    assert figures.requests > load.rate * load.before
    assert figures.downloads == load.downloads
    assert {*before}.isdisjoint({pid_of(relay, 0), pid_of(relay, 1)})
    assert relay.program.process.poll() is None


@pytest.mark.slow
async def test_workers_that_are_killed_at_random_cost_what_they_had_and_nothing_else(relay: Relay) -> None:
    """What a killed worker carried is cut off, and never looks complete. All others are served, late at most."""
    killed: list[int] = []

    async def kill(_number: int) -> None:
        worker = random.randrange(2)
        killed.append(pid_of(relay, worker))
        os.kill(killed[-1], signal.SIGKILL)
        await trio.to_thread.run_sync(wait_for_successor, relay, worker, killed[-1])

    load = Load(rate=20, kept=4, downloads=8, seconds=10.0, before=1.0, restarts=4)
    figures = await disturb_under_load(relay, load, kill)
    assert len(figures.failed) < figures.requests / 20, figures
    cut_off = ("EOF", "Broken", "502 Bad Gateway")  # and no wrong bytes
    failed = figures.failed + figures.kept_failed + figures.downloads_failed
    assert [why for why in failed if not any(word in why for word in cut_off)] == []


async def ask_all(relay: Relay, amount: int) -> list[bytes]:
    """Ask over so many connections side by side; returns the answers."""
    answers: list[bytes] = []

    async def ask(stream: trio.SocketStream) -> None:
        async with stream:
            answers.append(b"".join([data async for data in stream]))

    async with trio.open_nursery() as nursery:
        for number in range(amount):
            stream = await trio.open_tcp_stream("127.0.0.1", relay.ingress)
            await stream.send_all(f"GET /{number} HTTP/1.0\r\nHost: office.test\r\n\r\n".encode())
            nursery.start_soon(ask, stream)
    return answers


def status_of(relay: Relay) -> dict[str, Any]:
    arguments = ["relay", "status", "--json", "--config", str(relay.folder / "relay.toml")]
    found: dict[str, Any] = json.loads(CliRunner().invoke(pioneer_tunnel, arguments).output)
    return found


async def test_who_waits_at_a_worker_that_is_killed_is_served_by_another_one(relay: Relay, local_gateway: str) -> None:
    with exposed(relay, local_gateway):
        workers = (await trio.to_thread.run_sync(status_of, relay))["stats"]["workers"]
        (worker,) = [one["index"] for one in workers if not one["sessions_open"]]
        killed = pid_of(relay, worker)
        os.kill(killed, signal.SIGSTOP)  # so that it accepts nobody
        answers: list[bytes] = []

        async def ask() -> None:
            answers.extend(await ask_all(relay, 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            assert len(answers) < 20
            os.kill(killed, signal.SIGKILL)
        assert [answer[:15] for answer in answers] == [b"HTTP/1.0 200 OK"] * 20
        await trio.to_thread.run_sync(wait_for_successor, relay, worker, killed)
        assert pid_of(relay, worker) != killed


def test_an_operator_sees_all_workers_and_reloads_them_together(
    manager: socket.socket, relay: Relay, local_gateway: str
) -> None:
    assert manager.recv(100) == f"READY=1\nMAINPID={relay.program.process.pid}".encode()
    config = relay.folder / "relay.toml"
    workers = [pid_of(relay, worker) for worker in (0, 1)]
    for pid in workers:
        assert KEY.reveal().encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        own = {*Path(f"/proc/{relay.program.process.pid}/environ").read_bytes().split(b"\0")}
        more = {*Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")} - own
        assert [variable.partition(b"=")[0] for variable in more] == [b"PIONEER_TUNNEL_WORKER"]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert command == Path(f"/proc/{relay.program.process.pid}/cmdline").read_bytes()
    with exposed(relay, local_gateway):
        for number in range(20):
            assert relay.ask(f"/{number}").endswith(f"hello from /{number}".encode())
        shown = CliRunner().invoke(pioneer_tunnel, ["relay", "status", "--config", str(config)]).output
        assert "tunnels connected: 1 of 1\n" in shown
        assert all(f"worker {worker}: process {pid}, version" in shown for worker, pid in enumerate(workers)), shown
        found = status_of(relay)
        assert found["pid"] == relay.program.process.pid
        assert [worker["pid"] for worker in found["stats"]["workers"]] == workers
        assert found["stats"]["streams"]["opened_total"] == 20
        assert found["stats"]["tunnels"]["office"]["streams"]["opened_total"] == 20

        good = config.read_text()
        config.write_text(good.replace("[relay]", "[relay]\nheartbeat_ms = 1"))
        relay.program.process.send_signal(signal.SIGHUP)
        relay.program.wait_for("is not applied, the relay goes on as before: .*heartbeat_ms")
        relay.program.process.send_signal(signal.SIGUSR2)
        relay.program.wait_for("there is no successor of worker 0, and it goes on: .*heartbeat_ms")
        assert relay.ask("/one").endswith(b"hello from /one")

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            key = new_relay_key().identity().public_key
            more_tunnels = (
                f'{good}\n[[relay.tunnels]]\nid = "new"\nurl = "https://new.test:1"\nkey = "{key}"\n'
                f'bind_addr = "127.0.0.1:{port}"\n'
            )
            config.write_text(more_tunnels)
            relay.program.process.send_signal(signal.SIGHUP)
            relay.program.wait_for(f"is not applied, the relay goes on as before: .*cannot listen at 127.0.0.1:{port}")
        relay.program.process.send_signal(signal.SIGHUP)
        relay.program.wait_for("the configuration was applied; changes of tunnels: added 'new'")
        for _ in range(8):  # both workers reset a visitor whose gateway is away
            with suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), timeout=HANG) as visitor:
                assert visitor.recv(1) == b""
        config.write_text(good)
        relay.program.process.send_signal(signal.SIGHUP)
        relay.program.wait_for("the configuration was applied; changes of tunnels: removed 'new'")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=HANG)
        assert relay.ask("/two").endswith(b"hello from /two")
        assert [pid_of(relay, worker) for worker in (0, 1)] == workers, "nobody was replaced"
    stopped = time.monotonic()
    assert relay.program.interrupt(signal.SIGTERM) == 0
    assert time.monotonic() - stopped < HANG / 2
    assert all(map(is_gone, workers))
    told = [manager.recv(100).partition(b"\n")[0] for _ in range(11)]
    assert told == [b"RELOADING=1", b"READY=1"] * 5 + [b"STOPPING=1"]


def test_a_worker_that_is_asked_to_end_is_replaced_first_and_all_end_with_their_parent(
    runtime: Path, relay: Relay, local_gateway: str
) -> None:
    with exposed(relay, local_gateway):
        leaving = pid_of(relay, 0)
        os.kill(leaving, signal.SIGTERM)
        relay.program.wait_for(rf"(?s)worker 0, process {leaving}, listens.*worker 0, process \d+, listens")
        wait_until(lambda: is_gone(leaving))
        relay.ask_until("/one", b"hello from /one")
    assert "has ended" not in relay.program.errors
    workers = [pid_of(relay, worker) for worker in (0, 1)]
    relay.program.process.kill()
    relay.program.process.wait(HANG)
    wait_until(lambda: all(map(is_gone, workers)))
    with socket.create_server(("127.0.0.1", relay.ingress)):
        pass  # nobody holds the port
    relay.program.finish()  # without a traceback
    assert relay.program.errors.count("the parent process is gone; this worker drains") == 2
    assert [*runtime.glob("pioneer-tunnel-workers-*")] == [], "nothing is left behind"


def test_a_relay_that_cannot_start_says_why_once(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    text = '[relay]\ncontrol_addr = "127.0.0.1:0"\ningress_addr = "127.0.0.1:0"\nid = "r"\npublic_names = ["r.test"]\n'
    config.write_text(f'{text}identity_key_file = "none.hex"\n')
    failed = run("relay", "--workers", "2", "--config", config, started=True)
    assert failed.process.returncode == 41
    assert failed.errors.count("Error: the identity key file") == 1
    config.write_text(f"{text}[relay.limits]\nconnections = 20\n")
    failed = run("relay", "--workers", "2", "--config", config, started=True)
    assert failed.process.returncode == 31
    assert "relay.limits.connections" in failed.errors
    assert "16 for each of 2 workers" in failed.errors

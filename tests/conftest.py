"""Fixtures that all tests share, profiles of Hypothesis, and what mutation testing needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

import pytest
import trustme
from fuzzing import SEARCHING
from hypothesis import HealthCheck, Phase, find, settings, strategies
from mutation import JUDGES

from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import ENGINES, EngineName

pytest_plugins = [
    "gateway",  # aio_rig imports it: pytest rewrites the asserts of what it loads first
    "aio_rig",
    "diagnosis_rig",
    "keystores",
    "pebble",
    "process_rig",
    "programs",
    "rathole_rig",
    "reaper",
    "redis_server",
    "settings_files",
    "relay_thread",
    "yamux_session_rig",
]

# What collecting makes stays until the end; rounds of the garbage collector made a seventh of it.
gc.disable()

# The proxy of the machine is none of the tests'.
for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="session", autouse=True)
def trusted_by_the_system(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No public authority: OpenSSL reads a hundred and more of them for each context, which takes it 30 ms."""
    folder = tmp_path_factory.mktemp("authorities")
    trustme.CA().cert_pem.write_to_path(str(folder / "nobody.pem"))
    os.environ |= {"SSL_CERT_FILE": str(folder / "nobody.pem"), "SSL_CERT_DIR": str(folder)}


@pytest.fixture(scope="session", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where relays that the tests start put their control sockets."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


# The same examples each time, however slow the machine is.
settings.register_profile(
    "unit",
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("thorough", settings.get_profile("unit"), max_examples=100)  # `make test-all`
if not SEARCHING:
    settings.load_profile("thorough" if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else "unit")

# `make mutation`: a mutant is dead at the first example that fails, so nobody waits for the smallest one.
settings.register_profile(
    "mutation", derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let each worker of pytest-xdist begin with other modules.

    pytest compiles a module when it is first collected, and caches that. Together, the workers compile each one once.
    """
    report = yield
    worker = getattr(collector.config, "workerinput", None)
    if isinstance(collector, pytest.Dir) and worker is not None and report.result:
        start = len(report.result) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        report.result = [*report.result[start:], *report.result[:start]]
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give all workers of pytest-xdist the same order.

    While mutmut runs a mutant, run only the tests of its module, the quick ones first. mutmut gives the tests in no
    order; in this one, a mutant that makes a state machine hang is mostly dead before.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path)
    judges = JUDGES.get(os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".")[0])
    if judges is not None:
        config.hook.pytest_deselected(items=[item for item in items if item.path.name not in judges])
        items[:] = sorted(
            (item for item in items if item.path.name in judges),
            key=lambda item: (item.path, item.getparent(pytest.Class) is not None, item.location[1] or 0),
        )


def pytest_collection_finish() -> None:
    """Leave what exists before the first test out of the rounds of the garbage collector.

    Thousands of test items and all modules stay until the end; going through them made half the time of some tests.
    """
    gc.collect()
    gc.freeze()
    # Hypothesis warns when the collector does not know its random generator. It goes through all objects to see.
    find(strategies.none(), lambda _: True)
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000)  # it is 700 otherwise; rounds of the collector made a twentieth of all


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same for what a module has imported and left; tests that collect garbage go through all the rest."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[TunnelStream]:
    """The visitors that the tunnels of a test have taken for `accept` so far."""
    streams: list[TunnelStream] = []
    deliver = Tunnel.deliver

    def note(self: Tunnel, stream: TunnelStream) -> None:
        deliver(self, stream)
        streams.append(stream)

    monkeypatch.setattr(Tunnel, "deliver", note)
    return streams


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    """Each WebSocket engine that is installed, one after the other."""
    name: EngineName = request.param
    return name

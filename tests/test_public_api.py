"""What we promise: every public name is there, is documented, and cannot be subclassed by accident."""

from __future__ import annotations

import ast
import enum
import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
import typing
from types import ModuleType

import attrs
import pytest

PUBLIC_MODULES = [
    "pioneer_tunnel",
    "pioneer_tunnel.aio",
    "pioneer_tunnel.asgi",
    "pioneer_tunnel.blocking",
    "pioneer_tunnel.monitoring",
    "pioneer_tunnel.testing",
    "pioneer_tunnel.transports",
]


def public_classes(module: ModuleType) -> list[type]:
    return [value for name in module.__all__ if inspect.isclass(value := getattr(module, name))]


def explained_in_source(module: ModuleType, name: str) -> bool:
    """Whether the module that defines `name` has a string right below its assignment, as an alias or constant has."""
    for candidate in [module, *(importlib.import_module(found) for found in _modules_of(module))]:
        lines = inspect.getsource(candidate).splitlines()
        for number, line in enumerate(lines[:-1]):
            if line.startswith((f"{name}: ", f"{name} = ")) and _string_follows(lines, number):
                return True
    return False


def _string_follows(lines: list[str], number: int) -> bool:
    following = (line for line in lines[number + 1 :] if not line.startswith((" ", ")", "]", "}")))
    return next(following, "").startswith('"""')


def _modules_of(module: ModuleType) -> list[str]:
    """The modules that a package takes its names from."""
    package = module.__name__
    return [
        importlib.util.resolve_name("." * node.level + node.module, package)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
    ]


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_all_is_a_list_of_names_that_exist_once_each(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert module.__all__
    assert len(module.__all__) == len(set(module.__all__))
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def test_importing_the_package_leaves_out_what_a_tunnel_alone_does_not_need() -> None:
    unneeded = {"cattrs", "tomlkit", "h11", "http", "difflib", "importlib.metadata", "pioneer_tunnel.gateway"}
    unneeded |= {"pioneer_tunnel.access.guard", "pioneer_tunnel.transports.process", "pioneer_tunnel.tunnel.requests"}
    unneeded |= {"pioneer_tunnel.transports.rathole.control_channel", "pioneer_tunnel._http.requests"}
    code = f"import sys, pioneer_tunnel; assert not {unneeded} & sys.modules.keys(), {unneeded} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_takes_hardly_longer_than_before() -> None:
    """The modules that it imports beside Trio's: more than half of what `import pioneer_tunnel` costs."""
    code = "import sys, trio; before = len(sys.modules); import pioneer_tunnel; print(len(sys.modules) - before)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(imported.stdout) <= 180, "does each user of a tunnel need what is new? docs/performance.md has the goal"


def test_a_name_that_is_imported_later_is_there_and_others_are_not() -> None:
    code = (
        "import pioneer_tunnel; assert 'Settings' in dir(pioneer_tunnel); from pioneer_tunnel import Settings, Tunnels"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot import name 'Tunnels' from 'pioneer_tunnel'" in failed.stderr


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_what_a_user_sees_without_an_underscore_is_in_all(module_name: str) -> None:
    module = importlib.import_module(module_name)
    seen = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert seen <= set(module.__all__)


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_name_is_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert [name for name in module.__all__ if not _is_documented(module, name)] == []


def _is_documented(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    if name == "__version__":
        return isinstance(value, str)
    if inspect.isclass(value) or inspect.isfunction(value):
        return bool(value.__doc__ and value.__doc__.strip())
    return explained_in_source(module, name)  # by a docstring below its definition


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_method_is_documented(module_name: str) -> None:
    undocumented = [
        f"{cls.__name__}.{attribute}"
        for cls in public_classes(importlib.import_module(module_name))
        for attribute, value in vars(cls).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
        and not inspect.getdoc(value)
    ]
    assert undocumented == []


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_class_is_final_or_there_to_be_subclassed(module_name: str) -> None:
    """Final, abstract, a protocol, an enum with members (final by itself), or an exception of the tree."""
    neither = [
        cls.__name__
        for cls in public_classes(importlib.import_module(module_name))
        if not (
            getattr(cls, "__final__", False)
            or inspect.isabstract(cls)
            or getattr(cls, "_is_protocol", False)
            or (issubclass(cls, enum.Enum) and len(cls))
            or issubclass(cls, Exception)
        )
    ]
    assert neither == []


@pytest.mark.parametrize("module_name", [*PUBLIC_MODULES, "pioneer_tunnel.relay", "pioneer_tunnel.testing.strategies"])
def test_a_class_or_function_names_the_module_that_publishes_it(module_name: str) -> None:
    module = importlib.import_module(module_name)
    for value in (getattr(module, name) for name in module.__all__):
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == module_name, value
            assert pickle.loads(pickle.dumps(value)) is value
        if inspect.isclass(value):
            typing.get_type_hints(value)
            assert not attrs.has(value) or not any(isinstance(field.type, str) for field in attrs.fields(value)), value


def test_a_traceback_shows_the_public_name_of_an_error() -> None:
    code = "import pioneer_tunnel; raise pioneer_tunnel.RelayConnectError('refused')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "pioneer_tunnel.RelayConnectError: refused"

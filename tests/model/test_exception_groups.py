"""`groups`: one thing that went wrong comes out as itself; more than one stays a group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio.testing
from rig import KEY

from pioneer_tunnel._model.exception_groups import leaves, lone_error_bare, open_tasks_beside_body
from pioneer_tunnel.testing import ScriptedTransport, open_memory_relay, open_pioneer_relay, open_status_recorder
from pioneer_tunnel.tunnel.tunnel import open_tunnel


def test_leaves_are_in_order_however_deep() -> None:
    one, two, three = ValueError(), KeyError(), TypeError()
    assert leaves(one) == [one]
    assert leaves(ExceptionGroup("", [one, ExceptionGroup("", [two, ExceptionGroup("", [three])])])) == [
        one,
        two,
        three,
    ]


async def test_a_lone_error_comes_out_bare_with_its_own_history() -> None:
    error, cause, context = ValueError("it"), KeyError("why"), TypeError("when")
    error.__cause__, error.__context__ = cause, context
    with pytest.raises(ValueError, match="it") as raised, lone_error_bare():  # noqa: PT012
        async with trio.open_nursery() as outer, trio.open_nursery():
            outer.start_soon(trio.sleep_forever)
            raise error
    assert raised.value is error
    assert error.__cause__ is cause
    assert error.__context__ is context


def test_two_errors_stay_a_group() -> None:
    group = ExceptionGroup("both", [ValueError(), KeyError()])
    with pytest.raises(ExceptionGroup) as raised, lone_error_bare():
        raise group
    assert raised.value is group


async def test_cancellations_alone_stay_what_they_are() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with lone_error_bare():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught


def test_what_is_no_group_passes() -> None:
    with lone_error_bare():
        pass
    with pytest.raises(ValueError, match="bare"), lone_error_bare():
        raise ValueError("bare")
    with pytest.raises(KeyboardInterrupt), lone_error_bare():
        raise BaseExceptionGroup("", [KeyboardInterrupt()])


TESTS: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
    "open_memory_relay": open_memory_relay,
    "open_status_recorder": open_status_recorder,
}
"""These unwrap what the body raises, so that the nursery of a test does not hide its assertion."""
OPENERS: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
    "tasks beside a body": open_tasks_beside_body,
    "open_tunnel": lambda: open_tunnel("ws://relay.test", key=KEY, transport=ScriptedTransport()),
    "open_pioneer_relay": lambda: open_pioneer_relay(key=KEY, listen=False),
}


@pytest.fixture(params=[*OPENERS.values()], ids=[*OPENERS])
def opener(request: pytest.FixtureRequest) -> Callable[[], AbstractAsyncContextManager[object]]:
    found: Callable[[], AbstractAsyncContextManager[object]] = request.param
    return found


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        KeyboardInterrupt(),
        ExceptionGroup("mine", [ValueError("one")]),
        ExceptionGroup("mine", [ValueError("one"), ExceptionGroup("inner", [KeyError("two")])]),
        BaseExceptionGroup("mine", [KeyboardInterrupt()]),
    ],
    ids=repr,
)
async def test_what_a_body_raises_comes_out_as_it_is(
    opener: Callable[[], AbstractAsyncContextManager[object]], error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised:
        async with opener():
            raise error
    assert raised.value is error
    assert raised.value.__context__ is None


@pytest.mark.parametrize("opener", TESTS.values(), ids=[*TESTS])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine")], ids=repr)
async def test_for_a_test_a_single_error_comes_out_bare_and_several_do_not(
    opener: Callable[[], AbstractAsyncContextManager[object]], error: BaseException
) -> None:
    for raised in (error, BaseExceptionGroup("a nursery's", [error])):
        with pytest.raises(type(error)) as single:
            async with opener():
                raise raised
        assert single.value is error
    both = BaseExceptionGroup("mine", [error, KeyError()])
    with pytest.raises(BaseExceptionGroup) as several:
        async with opener():
            raise both
    assert leaves(several.value) == [*both.exceptions]


@pytest.mark.parametrize("opener", [*OPENERS.values(), *TESTS.values()], ids=[*OPENERS, *TESTS])
async def test_a_cancelled_body_is_cancelled(opener: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    with trio.CancelScope() as scope, pytest.raises(trio.Cancelled):  # noqa: PT012
        async with opener():
            scope.cancel()
            await trio.sleep_forever()
    with trio.CancelScope() as scope:
        async with opener(), trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def fail(error: BaseException) -> None:
    raise error


async def fail_beside_body(*errors: BaseException) -> None:
    async with open_tasks_beside_body() as nursery:
        for error in errors:
            nursery.start_soon(fail, error)
        await trio.sleep_forever()


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt("ours"), SystemExit(3)], ids=repr)
async def test_what_a_task_raises_ends_the_body_and_comes_out_bare(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        await fail_beside_body(error)
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        await fail_beside_body(BaseExceptionGroup("a nursery's", [error]))
    assert raised.value is error


async def test_two_errors_of_tasks_come_out_together() -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await fail_beside_body(ValueError("one"), KeyboardInterrupt("two"))
    assert {str(leaf) for leaf in leaves(raised.value)} == {"one", "two"}


@pytest.mark.parametrize("error", [KeyError("mine"), ExceptionGroup("mine", [KeyError("mine")])], ids=repr)
async def test_errors_of_the_body_and_of_a_task_come_out_together(error: Exception) -> None:
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with open_tasks_beside_body() as nursery:
            nursery.start_soon(fail, ValueError("ours"))
            try:
                await trio.sleep_forever()
            finally:
                raise error
    assert sorted(type(leaf).__name__ for leaf in leaves(raised.value)) == ["KeyError", "ValueError"]


async def test_a_group_of_the_body_that_also_holds_cancellations_by_a_task_loses_those_alone() -> None:
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with open_tasks_beside_body() as nursery, trio.open_nursery() as of_body:
            of_body.start_soon(trio.sleep_forever)
            nursery.start_soon(fail, ValueError("ours"))
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("mine")
    assert sorted(type(leaf).__name__ for leaf in leaves(raised.value)) == ["KeyError", "ValueError"]


async def test_a_task_that_ends_leaves_the_body_alone() -> None:
    async with open_tasks_beside_body() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
        await trio.testing.wait_all_tasks_blocked()

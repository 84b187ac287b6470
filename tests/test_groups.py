"""`groups`: one thing that went wrong comes out as itself; more than one stays a group."""

from __future__ import annotations

import pytest
import trio

from pioneer_tunnel.groups import leaves, lone_error_bare


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

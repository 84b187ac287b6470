"""Each program of README.md's section on servers runs as it is printed, with a relay that is really there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
from example_programs import GREETING, ROOT, Program, relay, running
from rig import KEY, RelayRig, connect, eventually, free_port, read_all

SECTION: Final = "## Your server behind the tunnel"
KEY_LINE: Final = """
from pathlib import Path
from pioneer_tunnel import RelayKey
key = RelayKey(Path("relay-key.txt").read_text().splitlines()[0])
"""
HOME: Final = """
@app.get("/")
async def home():
    return {"hello": "visitor"}
"""
STARLETTE: Final = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def home(request):
    return JSONResponse({"hello": "visitor"})

app = Starlette(routes=[Route("/", home)])
"""
QUART: Final = """
from quart_trio import QuartTrio

app = QuartTrio(__name__)
""" + HOME.replace("app.get", "app.route")
FLASK: Final = """
from flask import Flask

app = Flask(__name__)
""" + HOME.replace("async ", "")


@attrs.frozen
class Surroundings:
    """What a reader has around a program of README.md.

    Attributes:
        my_app: the content of my_app.py.
        before, after: what stands before and after the program in its own file.
        lines: the most that it may have.
        instead: what it says that may be done instead: a text, and what replaces it.
    """

    lines: int
    before: str = ""
    after: str = ""
    my_app: str = ""
    instead: tuple[str, str] = ("", "")


SERVE_BY_UVICORN: Final = HOME + "import sys, uvicorn\nuvicorn.run(app, port=int(sys.argv[1]))\n"

CASES: Final = {
    "trio.run(main)": [Surroundings(12, my_app=STARLETTE), Surroundings(12, my_app=QUART)],
    "lifespan=lifespan": [
        Surroundings(9, KEY_LINE, SERVE_BY_UVICORN),
        Surroundings(9, KEY_LINE, SERVE_BY_UVICORN, instead=("app=app)", 'forward_to="127.0.0.1:8000")')),
    ],
    "asyncio.run(main())": [Surroundings(9, KEY_LINE, my_app="from fastapi import FastAPI\napp = FastAPI()\n" + HOME)],
    "app.run(port=5000)": [Surroundings(5, KEY_LINE + FLASK)],
}
"""For each program, by a part of it."""


def programs() -> list[str]:
    section = (ROOT / "README.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def cases() -> list[object]:
    return [
        pytest.param(program, surroundings, id=f"{part}-{number}", marks=[pytest.mark.slow] * (number > 0))
        for program in programs()
        for part, of_program in CASES.items()
        if part in program
        for number, surroundings in enumerate(of_program)
    ]


def test_every_program_is_run_here() -> None:
    for program in programs():
        assert len([part for part in CASES if part in program]) == 1, program
    assert len(programs()) == len(CASES)


async def greeted(rig: RelayRig) -> bool:
    try:
        async with await connect(rig.addresses.tunnels["office"]) as visitor:
            await visitor.send_all(GREETING)
            answer = await read_all(visitor)
    except (OSError, trio.BrokenResourceError):
        return False  # the tunnel is not up yet: the relay resets the connection
    return answer.startswith(b"HTTP/1.1 200 ") and b"visitor" in answer


@pytest.mark.parametrize(("program", "surroundings"), cases())
async def test_a_program_serves_visitors_and_ends_when_it_is_interrupted(
    program: str, surroundings: Surroundings, tmp_path: Path
) -> None:
    assert len([line for line in program.splitlines() if line.strip()]) <= surroundings.lines
    port = str(free_port())
    async with relay(tmp_path) as (url, rig):
        text = program.replace(*surroundings.instead).replace("wss://relay.example.com", url)
        text = re.sub("5000|8000", port, text)
        (tmp_path / "my_app.py").write_text(surroundings.my_app)
        (tmp_path / "main.py").write_text(surroundings.before + text + surroundings.after)
        async with running("main.py", port, cwd=tmp_path) as started:
            await eventually(lambda: _still(started) and greeted(rig))
            assert await started.interrupt() in (0, 1, -2, 130), started.said
    assert KEY.reveal() not in started.said


def _still(program: Program) -> bool:
    assert program.process.returncode is None, program.said
    return True

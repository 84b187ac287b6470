"""`memory`: what a process has freed serves what it reads next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREES_BY_THE_MIB = """
import resource, sys
from pioneer_tunnel.cli.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    before = faults()
    keep_freed_memory()
    assert faults() - before < 100, "it is not touched"
pieces = [bytes([1]) * 261120 for _ in range(16)]
before = faults()
for _ in range(50):
    del pieces[:]
    pieces += [bytes([1]) * 261120 for _ in range(16)]
print(faults() - before)
"""


def faults(way: str) -> int:
    command = [sys.executable, "-c", FREES_BY_THE_MIB, way]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc allocates")
def test_what_was_freed_is_used_again() -> None:
    assert faults("keep") * 10 < faults("leave")

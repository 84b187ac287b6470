"""What an import costs a new process, in CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from .measuring import Figures

__all__ = ["measure_imports"]

MODULES: Final = ("trio", "pioneer_tunnel")


def measure_imports(rounds: int) -> Figures:
    """Milliseconds of CPU for each module, by `import_` and its name: medians of so many rounds.

    All modules are compiled before. Where that is kept in the environment of this process does not matter.
    """
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    with TemporaryDirectory() as compiled:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(rounds + 1):
            for module in MODULES:
                code = f"import time; began = time.process_time(); import {module}; print(time.process_time() - began)"
                command = [sys.executable, "-c", code]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                if number:  # the first one compiles
                    times[module].append(float(run.stdout) * 1000)
    return {f"import_{module}": median(values) for module, values in times.items()}

"""What an import costs a new process, in CPU time."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Final

from .measuring import Figures

__all__ = ["measure_imports"]

MODULES: Final = ("trio", "pioneer_tunnel")
ROUNDS: Final = 7


def measure_imports(rounds: int = ROUNDS) -> Figures:
    """Milliseconds of CPU for each module, by `import_` and its name: medians, after one import that nobody times."""
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for number in range(rounds + 1):
        for module in MODULES:
            code = f"import time; began = time.process_time(); import {module}; print(time.process_time() - began)"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            if number:
                times[module].append(float(run.stdout) * 1000)
    return {f"import_{module}": median(values) for module, values in times.items()}

"""Whether the data path of this installation is compiled. This module is compiled with it."""

from typing import Final

__all__ = ["COMPILED"]

COMPILED: Final[bool] = not __file__.endswith(".py")

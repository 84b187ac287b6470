"""The names of the WebSocket engines. They are apart from the engines, which take time to import."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["EngineName"]

EngineName: TypeAlias = Literal["websockets", "trio-websocket"]

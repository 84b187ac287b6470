"""The tables of metrics in docs/monitoring.md, made of the tables in the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pioneer_tunnel.monitoring import gateway_metrics
from pioneer_tunnel.monitoring.certificate_metrics import CERTIFICATE
from pioneer_tunnel.monitoring.exposition import Measure
from pioneer_tunnel.relay import metrics as relay_metrics

__all__ = ["TABLES"]

_HEAD: Final = "| name | type | labels | |\n|---|---|---|---|\n"


def _rows(prefix: str, measures: Sequence[Measure[Any]], *labels: str) -> str:
    rows = []
    for measure in measures:
        names = ", ".join(f"`{name}`" for name in (*labels, *([] if measure.label is None else [measure.label])))
        kind = "counter" if measure.is_counter else "gauge"
        rows.append(f"| `{prefix}{measure.name}` | {kind} | {names} | {measure.words} |\n")
    return "".join(rows)


def _state_sets() -> str:
    prefix = gateway_metrics.PREFIX
    return "".join(
        f"| `{prefix}{name}` | state set | `{prefix}{name}` | {words} |\n"
        for name, words in (gateway_metrics.STATE, gateway_metrics.ERROR)
    )


TABLES: Final = (
    _HEAD
    + _rows(relay_metrics.PREFIX, relay_metrics.RELAY)
    + _rows(relay_metrics.PREFIX, relay_metrics.TUNNEL, "tunnel")
    + _rows(relay_metrics.PREFIX, relay_metrics.STREAMS, "tunnel", "service")
    + _rows(relay_metrics.PREFIX, relay_metrics.WORKER, "worker")
    + _rows(relay_metrics.PREFIX, relay_metrics.FLEET)
    + _rows(relay_metrics.PREFIX, CERTIFICATE, "host"),
    _HEAD
    + _state_sets()
    + _rows(gateway_metrics.PREFIX, gateway_metrics.GATEWAY)
    + _rows(gateway_metrics.PREFIX, gateway_metrics.STREAMS, "service")
    + _rows(gateway_metrics.PREFIX, CERTIFICATE, "host"),
)
"""Of a relay, and of a gateway."""

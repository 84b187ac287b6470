"""Metrics for Prometheus, and health checks. They need the extra `metrics` (the package prometheus-client).

address, site        a small HTTP server for operators, which the relay's page uses as well
exposition           numbers as metric families, and their text
gateway_metrics      which number of a gateway is which metric; `relay/metrics.py` has those of a relay
serving              what is public here
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .serving import Source, collect_metrics, serve_metrics

__all__ = ["Source", "collect_metrics", "serve_metrics"]

_publish(globals())

"""The `pioneer-tunnel` command whose `expose` takes any number of visitors; it has no option for that.

python -m benchmarks.peers.many_streams ARGUMENTS…
"""

from __future__ import annotations

import functools

from pioneer_tunnel import Limits, open_tunnel
from pioneer_tunnel.cli import expose, main

__all__: list[str] = []

if __name__ == "__main__":
    limits = Limits(streams=1_000_000, unaccepted=1_000_000)
    vars(expose)["open_tunnel"] = functools.partial(open_tunnel, limits=limits)
    main()

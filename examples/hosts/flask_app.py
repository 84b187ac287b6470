"""Flask behind a tunnel: Flask serves a local port from threads, and the tunnel forwards visitors to it.

python examples/hosts/flask_app.py wss://relay.example.com relay-key.txt

To Flask, visitors come from 127.0.0.1: do not trust that address. Flask's reloader runs the program twice, and the two
would compete for the tunnel: leave it off, or open the tunnel where `WERKZEUG_RUN_MAIN` is set.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flask import Flask

from pioneer_tunnel import RelayKey
from pioneer_tunnel.blocking import open_tunnel

app = Flask(__name__)


@app.get("/")
def home() -> dict[str, str]:
    """Greet a visitor."""
    return {"hello": "visitor"}


if __name__ == "__main__":
    relay, key_file, *rest = sys.argv[1:]
    port = int(rest[0]) if rest else 5000
    key = RelayKey(Path(key_file).read_text().splitlines()[0])
    with open_tunnel(relay, key=key, forward_to=f"127.0.0.1:{port}") as tunnel:
        print(f"visitors come in at {tunnel.wait_connected(timeout=60).public_url}", flush=True)
        app.run(port=port)

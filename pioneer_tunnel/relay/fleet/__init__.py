"""Several relay processes that serve the same tunnels."""

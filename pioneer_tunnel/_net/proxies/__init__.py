"""Proxies on the way to a relay: which one, how it is asked for a tunnel, and the tunnel as a stream."""

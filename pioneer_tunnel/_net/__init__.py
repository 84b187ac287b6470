"""Streams and sockets. Knows no tunnel, no relay and no key."""

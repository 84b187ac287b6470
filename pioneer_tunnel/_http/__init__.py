"""HTTP/1 without I/O: heads, framing, following a connection."""

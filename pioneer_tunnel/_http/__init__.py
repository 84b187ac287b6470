"""HTTP/1 without I/O: heads and bodies, and where the messages of a connection end."""

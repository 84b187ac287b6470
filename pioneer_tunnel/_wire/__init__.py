"""Formats that gateway and relay share: the handshake and the PROXY header. No I/O."""

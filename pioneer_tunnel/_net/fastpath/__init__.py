"""Bytes between two plain sockets without a task for each: epoll and splice (Linux)."""

"""Several relays that work as one: a directory of all sessions, links between nodes, and tunnels that a key signs."""

"""The visitors' side of the relay."""

"""The gateways' side of the relay."""

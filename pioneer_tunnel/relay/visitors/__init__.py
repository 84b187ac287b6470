"""The relay towards visitors: HTTP, TLS and bound ports."""

"""The relay towards gateways: sessions, takeover, registry."""

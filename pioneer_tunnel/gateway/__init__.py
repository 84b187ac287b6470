"""What a gateway embeds: configuration, settings, keystore, `RemoteAccess`, JSON-RPC."""

"""A tunnel: accept visitors through reconnects. Start with `tunnel.tunnel`."""

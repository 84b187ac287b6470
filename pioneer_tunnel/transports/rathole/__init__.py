"""The transports `tcp` and `tls`: the Pioneer Relay (rathole) protocol."""

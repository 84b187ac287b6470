"""TLS: contexts, streams, certificates, and the ClientHello."""

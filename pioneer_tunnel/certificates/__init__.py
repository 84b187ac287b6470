"""Certificates from an ACME authority, such as Let's Encrypt: ordered, renewed and swapped in without a restart."""

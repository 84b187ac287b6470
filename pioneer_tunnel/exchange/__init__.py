"""Two legs and the bytes between them."""

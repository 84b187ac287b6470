"""Two streams and the bytes between them."""

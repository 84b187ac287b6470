"""What an operator does with a relay's file: make it, add and remove tunnels, check it."""

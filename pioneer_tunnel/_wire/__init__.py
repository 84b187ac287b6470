"""Message formats that both ends share. No I/O."""

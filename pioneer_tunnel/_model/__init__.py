"""Values and text: addresses, keys, errors, status. No Trio; imports nothing else of this package."""

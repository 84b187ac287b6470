"""Files and TOML: reading, editing, validating, and writing atomically."""

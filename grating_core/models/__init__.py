"""This room finds, reads and adapts models: directories, families, heads, adapters, identities."""

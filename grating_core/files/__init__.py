"""This room has the cache directory, locks, and files that are written as a whole or not at all."""

"""This room measures, simulates and distils. Nothing that computes a request imports it."""

"""What measures, simulates and distils; nothing that computes a request imports it."""

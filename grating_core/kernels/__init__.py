"""Products with what follows them, attention, norms and rotary positions: compiled, and in torch."""

"""This room estimates final scores: it fits lenses, keeps them, and recalibrates them."""

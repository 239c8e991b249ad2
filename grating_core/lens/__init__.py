"""Estimates of the final score: what they look at, how they are fitted, kept and kept true."""

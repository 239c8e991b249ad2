"""Weights from disk, hidden states to disk, and the plan that keeps both within a memory budget."""

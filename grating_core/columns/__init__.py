"""Dynamic input pruning computes a token with the columns of a gated MLP that matter to it (arXiv 2412.01380)."""

"""Dynamic input pruning: which columns of a gated MLP a token needs (arXiv 2412.01380)."""

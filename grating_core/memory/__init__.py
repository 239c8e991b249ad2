"""This room reads weights from disk, writes hidden states to disk, and plans both within a memory budget."""

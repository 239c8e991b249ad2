"""What a reranker is made of: embeddings, layers, a head, and the template that turns pairs into tokens."""

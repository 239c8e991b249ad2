"""The ragged batch, packed attention and the forward loop."""

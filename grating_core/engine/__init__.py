"""This room computes: the ragged batch, packed attention, the forward loop, decoding."""

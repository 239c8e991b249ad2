"""This room computes: ragged batches, passes of several requests, the forward loop, decoding."""

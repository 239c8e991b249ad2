"""This room is the mathematics of a layer: plain functions over tensors by role, described by a layer spec."""

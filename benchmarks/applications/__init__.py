"""The applications of :mod:`benchmarks.apps`."""

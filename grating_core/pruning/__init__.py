"""Policies decide which candidates go on. They see scores and numbers, never a model."""

from grating_core.pruning.cluster import ClusterPolicy
from grating_core.pruning.margins import MarginPolicy, Margins
from grating_core.pruning.policy import Off, PruningPolicy, Route

__all__ = ["ClusterPolicy", "MarginPolicy", "Margins", "Off", "PruningPolicy", "Route"]

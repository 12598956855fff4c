"""Policies: a pipeline seen as a Markov decision process. The only place that knows dimensions and conditions."""

from .base import Conditioning, DenoisingPolicy, make_policy
from .volume import VolumePolicy


__all__ = ["Conditioning", "DenoisingPolicy", "VolumePolicy", "make_policy"]

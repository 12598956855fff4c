"""Measuring: features, distances between sets of volumes, and how far a reward can be trusted."""

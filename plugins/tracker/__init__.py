"""Trackers: where the figures of a training run go."""

"""Optimizers: how gradients change parameters."""

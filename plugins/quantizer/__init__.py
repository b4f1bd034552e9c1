"""Quantizers: the formats of weights, activations and keys and values."""

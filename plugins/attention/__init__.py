"""Attention backends: how keys and values are kept, and attention over them."""

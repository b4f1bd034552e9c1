"""Checkpoint policies: which activations are kept, recomputed or offloaded."""

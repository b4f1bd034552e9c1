"""Stores: where training state is saved, and how."""

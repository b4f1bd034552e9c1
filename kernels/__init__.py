"""Kernel providers and their sources."""

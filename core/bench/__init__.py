"""Workloads and how to measure them."""

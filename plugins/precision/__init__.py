"""Precisions: parameter, compute and reduction types."""

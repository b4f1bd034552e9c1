"""Frontends: how requests arrive from outside the process."""

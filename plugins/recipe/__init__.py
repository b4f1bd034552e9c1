"""Recipes: what is trained, and on which data."""

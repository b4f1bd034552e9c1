"""Loaders: weight files, their configuration and tokenizer."""

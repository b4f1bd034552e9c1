"""Schedulers: which requests get how many tokens in the next step."""

"""Serving: requests, KV blocks, the step loop, sampling, text in and out."""

"""Every concrete feature, one folder a kind; each is found through its entry point in pyproject.toml."""

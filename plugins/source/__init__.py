"""Sources: where a model name is fetched from."""

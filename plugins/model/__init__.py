"""Model plugins: architectures as torch modules."""

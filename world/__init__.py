"""The rendered worlds."""

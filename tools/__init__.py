"""Commands beside the loop, each python -m tools.NAME."""

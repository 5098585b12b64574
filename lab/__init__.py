"""The project's own bench."""

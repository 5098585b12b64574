"""Frames -> numbers, as the official evaluators compute them: a module for each, found by its name."""

"""Files -> frames: a module for each format, found by its name."""

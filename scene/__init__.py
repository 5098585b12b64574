"""Boxes, cameras and pictures, and their conventions."""

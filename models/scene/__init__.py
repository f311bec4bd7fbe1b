"""Scenes in three dimensions: cameras, and the world of solids that comes with its own ground truth."""

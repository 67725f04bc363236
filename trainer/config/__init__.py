"""A run's settings: their sections, presets, and how they are read."""

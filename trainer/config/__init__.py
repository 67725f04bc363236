"""A run's settings: their sections, presets, and how they are read."""

LARGEST_SEED = 2**64 - 1  # what torch's generators take

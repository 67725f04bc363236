"""The parts of the fuzz run: what is mutated, how, and what is watched."""

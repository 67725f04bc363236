"""Less memory and less time for the same update: quantised, compiled, offloaded, computed again, folded."""

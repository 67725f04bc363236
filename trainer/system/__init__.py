"""Files, locks, signals, processes and the machine: what knows nothing of diffusion."""

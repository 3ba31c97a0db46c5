"""Training: the two stages, the loop, checkpoints, run folders, ranks."""

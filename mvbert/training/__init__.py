"""One run folder: the two stages, the loop, checkpoints, ranks."""

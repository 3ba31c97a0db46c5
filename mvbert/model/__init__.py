"""Models, and reading and writing their folders. Independent of the training loop."""

"""Models, and the folders they are read from and written to. Nothing here knows a training loop."""

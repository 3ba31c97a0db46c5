"""Device code and its definitions, one file an op, imported as mvbert.kernels."""

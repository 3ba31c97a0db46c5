"""Device code and its plain definitions, imported as mvbert.kernels."""

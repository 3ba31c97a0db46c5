"""Exports models to other formats."""

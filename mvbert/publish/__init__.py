"""Writes models in other programs' formats."""

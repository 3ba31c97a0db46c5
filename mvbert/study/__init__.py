"""Compares and measures trained models."""

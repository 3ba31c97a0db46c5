"""Evaluation: measures of trained models, and studies that compare them."""

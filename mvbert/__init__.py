"""mvbert: extremely small BERT models from mixed-vocabulary training."""

__version__ = "0.1.0"

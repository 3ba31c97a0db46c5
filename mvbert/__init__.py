"""mvbert: extremely small BERT models from mixed-vocabulary training."""

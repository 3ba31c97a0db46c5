"""Text to training rows: readers, corpus, vocabulary, tokenizer. Nothing here imports torch."""

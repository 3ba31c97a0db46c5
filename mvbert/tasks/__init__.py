"""One fine-tuned model: reading a task, training, scoring."""

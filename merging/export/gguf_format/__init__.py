"""Model folders as GGUF files: hyperparameters, tokenizer, and tensors."""

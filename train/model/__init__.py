"""The base model and the LoRA on it."""

"""Training: data → DeepSpeed ZeRO-3 LoRA → a verified adapter directory. Knows nothing of HTTP, pools or roles."""

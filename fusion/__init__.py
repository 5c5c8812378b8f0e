"""The fusion room: one chat request → pool → judge → one completion, and its trace.

Reads from the outside in: `gateway` (HTTP) → `chat` (the request) → `best_of`, `merge`, `debate` (the modes)
→ `run` (what the modes share) → `pool` and `judge` → `upstream` (one call). It talks OpenAI-compatible HTTP
only; it knows no torch, no transformers and nothing of vLLM's inside.
"""

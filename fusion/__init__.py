"""The fusion room: one chat request goes to a pool of models; one answer comes back, and a trace is stored.

`http` reads a request and plans it, a mode in `modes` answers it with the tools in `answering`, `calls` makes one call
to one model, and `store` keeps the trace. `measure` and `labels` use the same parts outside the gateway. The room
speaks OpenAI-compatible HTTP only: it knows neither torch nor transformers nor vLLM.
"""

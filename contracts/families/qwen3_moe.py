"""Qwen3-MoE (arXiv 2505.09388): 30B-A3B and 235B-A22B.

Checked against transformers 5.19 (`models/qwen3_moe`) and vLLM 0.32 (`model_executor/models/qwen3_moe.py`).
"""

from mixfuse.contracts.family import Family, Unsupported

FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    class_prefix="Qwen3Moe",
    checkpoint_block="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    # Checkpoints on the Hub have num_experts. transformers 5 saves the same config with num_local_experts.
    experts_keys=("num_experts", "num_local_experts"),
    inner_key="moe_intermediate_size",
    default_top_k=8,
    tool_parser="hermes",
    qk_norm=True,
    # The model has no dense layers, but the key for their size has a large default.
    tiny={"intermediate_size": 128, "norm_topk_prob": True},
    unsupported=(
        Unsupported("mlp_only_layers", (None, []), "some layers would be dense, but every layer must have experts"),
        Unsupported("decoder_sparse_step", (1,), "some layers would be dense, but every layer must have experts"),
        Unsupported("shared_expert_intermediate_size", (None, 0), "transformers' qwen3_moe has no shared expert"),
        Unsupported("hidden_act", ("silu",), "the experts' LoRA is written for SiLU"),
        Unsupported("attention_bias", (False,), "vLLM's qwen3_moe omits the bias of o_proj"),
        Unsupported(
            "use_sliding_window", (False,), "serving with a sliding window has not been compared with transformers"
        ),
    ),
)

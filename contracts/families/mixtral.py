"""Mixtral (arXiv 2401.04088): 8x7B and 8x22B."""

from mixfuse.contracts.family import Family

FAMILY = Family(
    model_type="mixtral",
    title="Mixtral",
    class_prefix="Mixtral",
    checkpoint_block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    experts_keys=("num_local_experts",),
    inner_key="intermediate_size",
    default_top_k=2,
    tool_parser="mistral",
)
